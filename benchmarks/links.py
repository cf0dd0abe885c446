"""How long a sampling step waits for its communication, over links of a chosen bandwidth, on a machine without GPUs.

    python benchmarks/links.py --model cogvideox-5b --mbit 0 1600 400 --sides ours cache-dit one

Linux and root only, elsewhere it says so and ends: every rank runs in a network namespace of its own, with one thread
on a core of its own and a limit on what it sends (`benchmarks/namespaces.py`). All layouts, sides and rates take turns
in the same processes; medians are printed. A step is that of `benchmarks/step.py`, with fewer heads and blocks.

work: seconds of the slowest rank's core, all threads; that is computing and, on a CPU, copying to and from the network.
link: bytes of the rank that sends most, headers included, over the rate. exposed: step - max(work, link), as a share
of the step; what is over that maximum is waiting that better hiding could remove. even at: the rate at which a side's
link takes as long as its work. `interleaved`: ours with guidance branches in turn; `one`: ours on one core;
`cache-dit`: its context parallelism (Ulysses) of diffusers' model, where that package is installed and takes the model.
With more ranks than cores no clock proves anything.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from benchmarks import door, forks, namespaces
from benchmarks.step import DTYPES, Ours, Theirs, Timer, load_side
from benchmarks.step_models import Case, Model
from common.parallel.interleaver import Interleaver
from common.parallel.mesh import Mesh, build_mesh, distributed
from common.registry.forks import get_model, model_names
from common.registry.layout import Layout, layouts_of
from common.system.stopping import Stopped, stoppable

SIDES = ("ours", "one", "cache-dit", "interleaved")
FOLDER = "LINKS_FOLDER"
"""The variable that tells a rank where the weights are."""


class Turn(NamedTuple):
    """Of one step: seconds by the clock, seconds of the core that worked most, bytes of the rank that sent most."""

    step: float
    work: float
    sent: float


def parse() -> argparse.Namespace:
    parser = door.Parser(__doc__)
    parser.add_argument("--model", type=forks.named, default=model_names()[0], help=", ".join(model_names()))
    parser.add_argument("--ranks", type=door.whole(64, least=2), default=2)
    parser.add_argument(
        "--layouts", type=layout, nargs="+", help="cfg x ring x ulysses, such as 1x2x1; default: all of the ranks"
    )
    parser.add_argument("--overlap-groups", type=door.whole(1024), nargs="+", default=[1])
    parser.add_argument("--mbit", type=door.rate, nargs="+", default=[0.0, 1600.0, 400.0], help="0: no limit")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:3]))
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--tokens", type=door.whole(10**7), default=2016)
    parser.add_argument("--words", type=door.whole(256, least=0), default=256, help="as for step.py")
    parser.add_argument("--heads", type=door.whole(1024), default=12, help="of the model's own")
    parser.add_argument("--depth", type=door.whole(1024), default=2, help="blocks")
    parser.add_argument("--rounds", type=door.whole(10**6), default=5)
    parser.add_argument("--output", type=door.new_file, help="also write the figures here, as JSON")
    args = parser.parse_args()
    args.layouts = args.layouts or [d for d in layouts_of(args.ranks) if d.ulysses <= args.heads]
    if (wrong := wrong_together(args)) is not None:
        parser.error(wrong)
    return args


def reduced(args: argparse.Namespace) -> Model:
    """What is measured. ValueError for numbers of heads or blocks that cannot be."""
    registered = get_model(args.model)
    return forks.function(registered, "step")(registered, args.heads, args.depth, args.words)


def layout(text: str) -> Layout:
    """An argparse type: cfg x ring x ulysses."""
    if (found := re.fullmatch(r"(\d{1,4})x(\d{1,4})x(\d{1,4})", text)) is None:
        raise argparse.ArgumentTypeError(f"{text} is not cfg x ring x ulysses, such as 1x2x1")
    try:
        return Layout(*map(int, found.groups()))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def wrong_together(args: argparse.Namespace) -> str | None:
    """What is wrong with the options together."""
    for one in args.layouts:
        if one.ranks != args.ranks:
            return f"--layouts: {one} is for {one.ranks} ranks, --ranks is {args.ranks}"
        if one.ulysses > args.heads:
            return f"{one.ulysses} ulysses ranks are more than --heads {args.heads}; the rest can go to --ring"
    try:
        reduced(args)
    except ValueError as error:
        return str(error)
    return None


class Rank:
    """One rank's sides, and the turns that they take. Collective, as all its methods."""

    def __init__(self, args: argparse.Namespace, mesh: Mesh, model: Model, folder: Path) -> None:
        self.args, self.mesh, self.timer = args, mesh, Timer(mesh, "wall")
        case = model.case(args.tokens, mesh.device, DTYPES[args.dtype])
        self.sides: dict[str, Ours | Theirs | None] = {}
        for place in args.layouts if {"ours", "interleaved"} & set(args.sides) else ():
            own = mesh if place == mesh.layout else build_mesh(place, mesh.device)
            for groups in args.overlap_groups if place.sequence > 1 else [1]:
                name = "x".join(map(str, place.degrees)) + (f", {groups} groups" if groups > 1 else "")
                if "ours" in args.sides:
                    self.sides[f"ours {name}"] = self._load("ours", model, folder, own, case, groups)
                if "interleaved" in args.sides and place.cfg == 1:
                    turns = replace(own, interleaver=Interleaver())
                    self.sides[f"interleaved {name}"] = self._load("ours", model, folder, turns, case, groups)
        if "one" in args.sides:
            alone = Mesh(device=mesh.device)
            self.sides["one"] = self._load("ours", model, folder, alone, case, 1) if mesh.is_main else None
        if "cache-dit" in args.sides:
            self._add_peer(model, folder, case)

    def _load(self, side: str, model: Model, folder: Path, mesh: Mesh, case: Case, groups: int) -> Ours | Theirs:
        module, sp = load_side(side, model, folder, mesh, self.args.dtype, groups)
        return Theirs(module, case) if sp is None else Ours(module, case, mesh, sp)

    def _add_peer(self, model: Model, folder: Path, case: Case) -> None:
        said = None if find_spec("cache_dit") is not None else "not installed (pip install cache-dit)"
        if said is None:
            try:
                side = self._load("cache-dit", model, folder, self.mesh, case, 1)
                side.step()
                self.sides["cache-dit"] = side
            except (ValueError, NotImplementedError, AssertionError) as error:  # the same on every rank
                said = f"does not take this: {error}"
        if said is not None and self.mesh.is_main:
            print(f"cache-dit is skipped: {said}", flush=True)

    def sweep(self) -> dict[float, dict[str, Turn]]:
        """Medians by rate and side. The first round is not counted."""
        turns: dict[tuple[float, str], list[Turn]] = defaultdict(list)
        for _ in range(self.args.rounds + 1):
            for mbit in self.args.mbit:
                namespaces.limit(mbit)
                for name, side in self.sides.items():
                    turns[mbit, name].append(self._turn(side))
        return {
            mbit: {name: Turn(*map(statistics.median, zip(*turns[mbit, name][1:]))) for name in self.sides}
            for mbit in self.args.mbit
        }

    def _turn(self, side: Ours | Theirs | None) -> Turn:
        work, sent = time.process_time(), namespaces.sent_bytes()
        step = self.timer(lambda: None if side is None else side.step())
        own = torch.tensor(
            [step, time.process_time() - work, namespaces.sent_bytes() - sent],
            dtype=torch.float64,
            device=self.mesh.device,
        )
        dist.all_reduce(own, dist.ReduceOp.MAX)
        return Turn(*own.tolist())


def row(turn: Turn, mbit: float) -> dict[str, float]:
    """What a median turn at a rate comes to, as the table has it."""
    link = turn.sent * 8 / (mbit * 1e6) if mbit else 0.0
    floor = max(turn.work, link)
    exposed = max(0.0, turn.step - floor)
    even = turn.sent * 8 / 1e6 / turn.work
    shares = {"exposed_s": exposed, "exposed_share": exposed / turn.step, "over_floor": turn.step / floor}
    return {"step_s": turn.step, "work_s": turn.work, "link_s": link, "sent": turn.sent, **shares, "even_mbit": even}


def show(rows: dict[float, dict[str, dict[str, float]]]) -> None:
    print(f"{'Mbit/s':>8}  {'side':24}{'step s':>8}{'work s':>8}{'link s':>8}{'MB sent':>9}", end="")
    print(f"{'exposed':>9}{'x floor':>9}{'even at':>9}")
    for mbit, sides in rows.items():
        for name, r in sides.items():
            print(f"{f'{mbit:g}' if mbit else 'no limit':>8}  {name:24}", end="")
            print(f"{r['step_s']:8.3f}{r['work_s']:8.3f}{r['link_s']:8.3f}{r['sent'] / 1e6:9.1f}", end="")
            print(f"{100 * r['exposed_share']:7.0f} %{r['over_floor']:9.2f}{r['even_mbit']:9.0f}")


@torch.no_grad()
def on_rank(args: argparse.Namespace, model: Model) -> None:
    """What each rank's process does: rank 0 prints."""
    rank, cores = int(os.environ["RANK"]), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    with distributed(args.layouts[0]) as mesh:
        found = Rank(args, mesh, model, Path(os.environ[FOLDER])).sweep()
        if not mesh.is_main:
            return
        rows = {mbit: {name: row(turn, mbit) for name, turn in sides.items()} for mbit, sides in found.items()}
        if args.ranks > len(cores):
            print(f"{args.ranks} ranks share {len(cores)} cores: the seconds prove nothing")
        print(f"{args.model}: {args.heads} heads, {args.depth} blocks, {args.tokens} tokens, {args.dtype}, ", end="")
        print(f"{args.ranks} ranks of one thread; medians of {args.rounds} rounds")
        show(rows)
        if args.output is not None:
            args.output.write_text(json.dumps(about(args) | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def about(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: value for name, value in vars(args).items() if name != "output"}
    options["layouts"] = ["x".join(map(str, one.degrees)) for one in args.layouts]
    return {"benchmark": "links", "options": options, "torch": torch.__version__, "date": time.strftime("%F")}


def main() -> None:
    args = parse()
    model = reduced(args)
    if FOLDER in os.environ:
        on_rank(args, model)
        return
    if (problem := namespaces.problem()) is not None:
        print(f"skipped: {problem}")
        return
    try:
        with stoppable(), tempfile.TemporaryDirectory() as folder, namespaces.Network(args.ranks) as network:
            model.write(Path(folder))
            status = network.run([sys.executable, *sys.argv], {FOLDER: folder})
    except Stopped as stopped:
        status = stopped.status
    sys.exit(status)


if __name__ == "__main__":
    main()
