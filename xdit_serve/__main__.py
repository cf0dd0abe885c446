from common.system.entry import begin


def main() -> int:
    begin()
    from xdit_serve.cli import main as run

    return run()


if __name__ == "__main__":
    import sys

    sys.exit(main())
