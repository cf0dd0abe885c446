"""Measure on this machine what the documentation claims of GPUs, and say which claims hold.

    make gpu-check                              # everything, in parts of at most 8 minutes; again: goes on
    make gpu-check PYTHON=python3               # in an environment that is there, without installing anything
    python -m benchmarks.gpu_check --list       # the parts, and which are done
    python -m benchmarks.gpu_check --parts step peers --models MODEL
    python -m benchmarks.gpu_check --again exact

Needs no weights and no network. Results go to benchmarks/results/GPU-DATE/: a json and a log for each part,
environment.json and README.md, which begins with the verdicts. A command goes on with the newest folder of this machine
that is not complete; parts that are done are not run again unless named with --again. Without a GPU the same program
runs in miniature on two CPU ranks, into outputs/gpu-check.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks import door
from benchmarks.gpu_check import machine, runner
from benchmarks.gpu_check.claims import verdicts
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.parts import ROOT, all_parts
from benchmarks.gpu_check.runner import Kept, Part
from benchmarks.gpu_check.summary import page


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = door.Parser(__doc__, prog="gpu-check")
    parser.add_argument("--parts", nargs="+", default=[], help="only these, by name or its beginning")
    parser.add_argument("--again", nargs="+", default=[], help="run these although they are done; all for every part")
    parser.add_argument("--models", nargs="+", default=[], help="default: all that are registered")
    parser.add_argument("--mini", action="store_true", help="the miniature on the CPU, where there is a GPU too")
    parser.add_argument("--list", action="store_true", help="show the parts and end")
    parser.add_argument("--output", type=Path, help="the folder of the results")
    return parser.parse_args(arguments)


def matching(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """The parts that begin with one of the names. ValueError for a name that none begins with."""
    for name in names:
        if name != "all" and not any(part.name.startswith(name) for part in parts):
            raise ValueError(f"there is no part {name}; choose of {', '.join(part.name for part in parts)}")
    return [part for part in parts if "all" in names or part.name.startswith(tuple(names))] if names else []


def folder_of(here: Machine, parts: Sequence[Part], again: bool) -> Path:
    """The newest folder of this machine that wants more, or whose parts are to be run again; else a new one."""
    home = ROOT / "outputs" / "gpu-check" if here.mini else ROOT / "benchmarks" / "results"
    old = sorted(home.glob(f"{here.slug}-20[0-9][0-9]-[0-9][0-9]-[0-9][0-9]"))
    if old and (again or not all(Kept.read(old[-1], part.name).finished for part in parts)):
        return old[-1]
    return home / f"{here.slug}-{datetime.date.today().isoformat()}"


def write(folder: Path, here: Machine, parts: Sequence[Part]) -> list[str]:
    """The summary of what is there; returns a line for each verdict."""
    results = {part.name: Kept.read(folder, part.name) for part in parts}
    results = {name: kept for name, kept in results.items() if kept.data["state"]}
    found = list(verdicts(here, {name: kept.rows for name, kept in results.items()}))
    about = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(page(here, about, parts, results, found), encoding="utf-8")
    return [str(one) for one in found]


def check(arguments: Sequence[str] | None = None, make_parts=all_parts) -> int:
    """Exit status 0 when every part ran to its end, whatever the verdicts; 1 when some did not; 2 for wrong use."""
    args = parse(arguments)
    try:
        here = machine.find(args.models, args.mini)
        parts = make_parts(here)
        chosen, again = matching(parts, args.parts) or parts, matching(parts, args.again)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        print(f"error: --output {args.output} is a file; name a folder", file=sys.stderr)
        return 2
    folder = args.output or folder_of(here, parts, bool(again))
    if args.list:
        for part in parts:
            print(f"{part.name:24} {Kept.read(folder, part.name).data['state'] or 'not run':12} {part.title}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    about = json.dumps(machine.environment(here), indent=1)
    (folder / "environment.json").write_text(about + "\n", encoding="utf-8")
    print(f"{here.name}, {here.gpus or 'no'} GPU(s): {len(chosen)} parts, into {folder}", flush=True)
    done = []
    for part in chosen:
        done.append(runner.run(part, here, folder, part in again, lambda line: print(line, flush=True)))
        lines = write(folder, here, parts)
    print("\n".join(lines))
    kept_of = zip((part.name for part in chosen), done)
    wrong = [f"{key} of {name}" for name, kept in kept_of for key, row in kept.rows.items() if "error" in row]
    if wrong:
        print(f"failed, which is no verdict: {', '.join(wrong)}; {folder / 'README.md'} says why")
    print(f"written: {folder / 'README.md'}; attach the folder to an issue")
    return 0 if all(kept.finished for kept in done) else 1


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(check())
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
