"""Whether Ulysses' all-to-all in groups of heads (`--overlap-groups`) pays here: seconds of one attention call.

    torchrun --nproc-per-node 2 benchmarks/overlap.py --tokens 4000 --groups 1 2 4

Numbers of groups take turns; the median and the least of the slowest rank are printed. On one machine's CPU there is
nothing to gain from hiding communication that the same cores carry out; between GPUs or hosts there may be.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from benchmarks import door
from benchmarks.step import DTYPES, Timer
from common.parallel.mesh import Layout, Mesh, distributed
from common.parallel.usp import SequenceParallel


def parse() -> argparse.Namespace:
    parser = door.Parser(__doc__)
    parser.add_argument("--tokens", type=door.whole(10**7), default=4000)
    parser.add_argument("--heads", type=door.whole(1024), default=24)
    parser.add_argument("--width", type=door.whole(1024), default=128, help="of a head")
    parser.add_argument("--ring", type=door.ranks, default=1)
    parser.add_argument("--groups", type=door.whole(1024), nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=door.whole(10**6), default=7)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=door.new_file, help="also write the figures here, as JSON")
    args = parser.parse_args()
    args.ranks = int(os.environ.get("WORLD_SIZE", "1"))
    problem = door.device_problem(args.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    ulysses, rest = divmod(args.ranks, args.ring)
    if rest:
        problem = f"{args.ranks} ranks (of torchrun) do not divide by --ring {args.ring}"
    elif ulysses > args.heads:
        problem = f"{ulysses} ulysses ranks are more than --heads {args.heads}; the rest can go to --ring"
    if problem is not None:
        parser.error(problem)
    return args


@torch.no_grad()
def measure(args: argparse.Namespace, mesh: Mesh) -> dict[int, dict[str, float]]:
    """Median and least seconds of one attention call, on the slowest rank, for each number of groups. Collective."""
    timer = Timer(mesh, "wall")
    sides = {groups: SequenceParallel(mesh, groups=groups) for groups in args.groups}
    lengths = sides[args.groups[0]].lengths(args.tokens)
    shape = (3, 1, lengths[mesh.sequence.rank], args.heads, args.width)
    q, k, v = torch.randn(shape, device=mesh.device, dtype=DTYPES[args.dtype])
    seconds: dict[int, list[float]] = {groups: [] for groups in sides}
    for _ in range(args.rounds + 1):
        for groups, sp in sides.items():
            taken = torch.tensor([timer(lambda sp=sp: sp.attention(q, k, v, lengths))], device=mesh.device)
            if mesh.world.group is not None:
                dist.all_reduce(taken, dist.ReduceOp.MAX)
            seconds[groups].append(taken.item())
    return {groups: {"median": statistics.median(t[1:]), "least": min(t[1:])} for groups, t in seconds.items()}


def main() -> None:
    args = parse()
    with distributed(Layout(ring=args.ring, ulysses=args.ranks // args.ring), args.device) as mesh:
        found = measure(args, mesh)
        if not mesh.is_main:
            return
        for groups, times in found.items():
            print(f"{groups:3d} groups: median {times['median']:.4f} s, least {times['least']:.4f} s")
        if args.output is not None:
            options = {name: value for name, value in vars(args).items() if name != "output"}
            medians = {groups: times["median"] for groups, times in found.items()}
            about = {"options": options, "seconds": medians, "torch": torch.__version__, "date": time.strftime("%F")}
            args.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
