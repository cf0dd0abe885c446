"""`xdit-download MODEL [--dir FOLDER]`. Exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from common.registry.forks import get_model, model_names, version
from common.system.units import gb
from xdit_download.hub import DownloadError, RemoteFile, fetch, free_room, make_room, plan, verify


@click.command(
    "xdit-download",
    help="Fetch exactly the files that the programs read of MODEL. Run it again to go on after an interruption.\n\n"
    f"MODEL is one of {', '.join(model_names())}.",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-").lower(),
    },
)
@click.argument("model")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to. Default: the model's name, here.")
@click.option("--revision", help="A branch, tag or commit of the model's repository. Default: the newest.")
@click.option("--check-hashes", is_flag=True, help="Read the files again and compare their SHA-256 with the hub's.")
@click.option("--dry-run", is_flag=True, help="Only say what would be fetched.")
@click.version_option(version(), message="%(prog)s %(version)s", help="Show the version.")
def command(model: str, folder: Path | None, revision: str | None, check_hashes: bool, dry_run: bool) -> None:
    try:
        entry = get_model(model)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="MODEL") from None
    folder = folder or Path(entry.folder or entry.name)
    if folder.exists() and not folder.is_dir():
        raise click.BadParameter(f"{folder} is a file; name a folder", param_hint="--dir")
    files = plan(entry, folder, revision)
    _tell(entry.name, files, folder)
    if dry_run:
        return
    make_room(files, folder)
    for one in files:
        fetch(one)
        if check_hashes:
            verify(one)
    click.echo(f"{len(files)} files are complete; use --model-dir {folder}")


def _tell(model: str, downloads: Sequence[RemoteFile], folder: Path) -> None:
    total, needed = sum(one.size for one in downloads), sum(one.missing for one in downloads)
    room = f"{gb(free_room(folder))} free for {folder}"
    click.echo(f"{model}: {len(downloads)} files, {gb(total)}; {gb(needed)} to fetch, {room}")
    for part in dict.fromkeys(one.part for one in downloads):
        files = [one for one in downloads if one.part == part]
        click.echo(
            f"  {gb(sum(one.size for one in files)):>10}  {part.what}, from {part.repo}; licence: {part.licence}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        command.main(args=arguments, prog_name="xdit-download", standalone_mode=False)
    except click.UsageError as wrong:
        print(f"error: {wrong.format_message()}", file=sys.stderr)
        return 2
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (click.Abort, KeyboardInterrupt):
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
