from common.system.entry import begin


def main() -> None:
    begin()
    from wan_xdit.cli import main as run

    run()


if __name__ == "__main__":
    main()
