"""`python -m tests.rehearsal`; what it does is in a module that its processes can import."""

import sys

from tests.rehearsal.report import main

if __name__ == "__main__":
    sys.exit(main())
