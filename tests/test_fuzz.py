"""Hostile input: a bounded sample of `tests.fuzz`. More of it: `make fuzz`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.fuzz.cases import AREAS

CASES = {"arguments": 8, "prompts": 3, "names": 6, "profiles": 12, "configs": 4}
REST = 2

RUN = """
import json, sys
from tests.fuzz.run import outcomes, prepare
prepare()
wrong = []
for area, count in json.loads(sys.argv[1]).items():
    wrong += [(o.case.area, o.case.seed, o.problem, o.errors[-500:]) for o in outcomes(area, range(count)) if o.problem]
print(json.dumps(wrong))
"""


@pytest.mark.slow
def test_hostile_input_ends_in_one_clear_line():
    """In a process of its own: cases are forked from it, and this one has threads."""
    wanted = {area: CASES.get(area, REST) for area in AREAS}
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(wanted)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_judge_sees_what_is_wrong(tmp_path):
    from tests.fuzz import run
    from tests.fuzz.cases import Case

    case = Case("configs", 0, "mochi_xdit.cli", (), tmp_path, culprit="config.json")
    assert run._problem(case, None, "", 0) == f"no end within {run.SECONDS} s"
    assert run._problem(case, 1, "Traceback (most recent call last):\n", 0) == "a traceback"
    assert run._problem(case, -9, "", 0) == "status -9"
    assert run._problem(case, 2, "", 0)
    assert run._problem(case, 2, "error: bad\n", 0) == "no line names config.json"
    assert run._problem(case, 2, "error: config.json is bad\n", 4 << 30)
    assert run._problem(case, 2, "error: config.json\x1b[31m is bad\n", 0)
    assert run._problem(case, 0, "error: config.json\n", 0)
    assert run._problem(case, 2, "error: config.json is bad\n", 0) == ""
