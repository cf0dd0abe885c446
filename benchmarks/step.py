"""Time of one sampling step: ours and diffusers', each eager and compiled, in turns on the same weights.

    python benchmarks/step.py --model mochi --dtype bf16 --tokens 2000 4000 8000 --output step.json
    python benchmarks/step.py --model cogvideox-5b --ranks 2 --sides ours diffusers

A step is the prediction for both guidance branches, guidance and an Euler update. Width and depth are reduced so that
a laptop can hold all sides; the ratio of a step is that of its blocks, which repeat. What our `prepare` does once per
generation is not in a step; diffusers does it in every one. Compiled is block by block on both sides: ours with the
program's defaults, theirs with torch.compile's. Medians are printed, and each side's time over ours of the same kind.

On the CPU, N ranks share the cores that diffusers has for itself. `--sides ours cache-dit` (pip install cache-dit)
runs diffusers' CogVideoX on the same ranks under cache-dit's context parallelism (Ulysses), which wants text and video
tokens and ranks that divide; its ring does not run on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import door, forks
from benchmarks.step_models import Case, Model
from common.model.compile import compile_transformer
from common.parallel.guidance import Guidance
from common.parallel.mesh import Layout, Mesh, distributed
from common.parallel.usp import SequenceParallel
from common.registry.forks import get_model, model_names
from common.registry.settings import CompileOptions

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("ours", "ours-compiled", "diffusers", "diffusers-compiled", "cache-dit")
SCALE = 4.5


def parse() -> argparse.Namespace:
    parser = door.Parser(__doc__)
    parser.add_argument("--model", type=forks.named, default=model_names()[0], help=", ".join(model_names()))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:4]))
    parser.add_argument("--ranks", type=door.ranks, default=1)
    parser.add_argument("--ring", type=door.ranks, default=1)
    parser.add_argument("--cfg", type=int, choices=[1, 2], default=1)
    parser.add_argument("--overlap-groups", type=door.whole(1024), default=1)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tokens", type=door.whole(10**7), nargs="+", default=[2000, 4000, 8000])
    parser.add_argument(
        "--words",
        type=door.whole(256, least=0),
        default=256,
        help="text tokens of a prompt, for models that drop padding",
    )
    parser.add_argument("--heads", type=door.whole(1024), default=12, help="of the model's own")
    parser.add_argument("--depth", type=door.whole(1024), default=2, help="blocks")
    parser.add_argument("--rounds", type=door.whole(10**6), default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--clock", default="wall", choices=CLOCKS, help="cpu: of all threads of a process, for a busy machine"
    )
    parser.add_argument("--output", type=door.new_file, help="also write the figures here, as JSON")
    args = parser.parse_args()
    if (problem := wrong(args)) is not None:
        parser.error(problem)
    return args


def wrong(args: argparse.Namespace) -> str | None:
    """What is wrong with the options together."""
    sequence = args.ranks // args.cfg // args.ring
    if args.cfg * args.ring * sequence != args.ranks:
        return f"--ranks {args.ranks} does not divide by --cfg {args.cfg} x --ring {args.ring}"
    if sequence > args.heads:
        return f"{sequence} ulysses ranks are more than --heads {args.heads}; the rest can go to --ring"
    if len(set(args.sides)) < len(args.sides):
        return "--sides names a side twice"
    if "cache-dit" in args.sides and find_spec("cache_dit") is None:
        return "--sides cache-dit needs the package: pip install cache-dit"
    if "RANK" not in os.environ and (problem := door.device_problem(args.device, args.ranks)) is not None:
        return problem
    registered = get_model(args.model)
    try:
        forks.function(registered, "step")(registered, args.heads, args.depth, args.words)
    except ValueError as error:
        return str(error)
    return None


class Timer:
    """Seconds of a call on the slowest rank, synchronised before and after."""

    def __init__(self, mesh: Mesh, clock: str) -> None:
        self.mesh, self.clock = mesh, CLOCKS[clock]

    def __call__(self, call: Callable[[], object]) -> float:
        self._wait()
        start = self.clock()
        call()
        self._wait()
        return self.clock() - start

    def _wait(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        if self.mesh.world.group is not None:
            dist.barrier()


class Ours:
    """Our model on this rank's tokens."""

    def __init__(self, model: nn.Module, case: Case, mesh: Mesh, sp: SequenceParallel) -> None:
        self.model, self.case, self.sp = model, case, sp
        self.conds, self.guide = case.prepare(model), Guidance(mesh.cfg)
        tokens = case.pack(case.latents)
        self.lengths, self.x = sp.lengths(tokens.shape[1]), sp.shard(tokens)

    def step(self) -> Tensor:
        return self.x + 0.02 * self.guided()

    def guided(self) -> Tensor:
        wanted = self.guide.branches(SCALE)
        forward = partial(self.case.forward, self.model, self.x)
        predictions = self.sp.each(forward, [self.conds[branch] for branch in wanted])
        return self.guide.combine(dict(zip(wanted, predictions)), SCALE)

    def prediction(self) -> Tensor:
        """Guided, on full latents. Collective."""
        return self.case.unpack(self.sp.gather(self.guided(), self.lengths))


class Theirs:
    """Diffusers' model on full latents."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.model, self.case = model, case

    def step(self) -> Tensor:
        return self.case.latents + 0.02 * self.prediction()

    def prediction(self) -> Tensor:
        good, bad = (out.float() for out in self.case.their_step(self.model))
        return bad + SCALE * (good - bad)


def load_side(side: str, model: Model, folder: Path, mesh: Mesh, dtype: str, groups: int) -> tuple[nn.Module, Any]:
    """A side's module, and the sequence parallelism of ours."""
    kind = DTYPES[dtype]
    if side.startswith("ours"):
        sp = SequenceParallel(mesh, groups=groups)
        module = model.ours(folder, sp, mesh.device, kind)
        compile_transformer(module, CompileOptions(compile=side.endswith("compiled")))
        return module, sp
    module = model.theirs(folder, kind).to(mesh.device)
    if side == "cache-dit":
        import cache_dit

        config = cache_dit.ParallelismConfig(ulysses_size=mesh.layout.ranks)
        cache_dit.enable_cache(module, cache_config=None, parallelism_config=config)
    if side.endswith("compiled"):
        for block in module.transformer_blocks:  # type: ignore[union-attr]
            block.compile()
    return module, None


def take_turns(steps: dict[str, Any], mesh: Mesh, args: argparse.Namespace, threads: int) -> dict[str, float]:
    """Medians of a step of each side, after one round that is not counted. Sides of one rank have all cores."""
    timer = Timer(mesh, args.clock)
    seconds: dict[str, list[float]] = {side: [] for side in args.sides}
    for _ in range(args.rounds + 1):
        for side, times in seconds.items():
            alone = side.startswith("diffusers")
            torch.set_num_threads(threads if alone else max(1, threads // mesh.layout.ranks))
            times.append(timer(steps[side].step if side in steps else lambda: None))
    return {side: statistics.median(times[1:]) for side, times in seconds.items()}


def peer_of(side: str) -> str:
    """Ours of the same kind."""
    return "ours-compiled" if side.endswith("compiled") else "ours"


@torch.no_grad()
def measure(args: argparse.Namespace, mesh: Mesh, model: Model, folder: Path, dtype: str) -> list[dict[str, Any]]:
    here = [side for side in args.sides if mesh.is_main or not side.startswith("diffusers")]
    modules = {side: load_side(side, model, folder, mesh, dtype, args.overlap_groups) for side in here}
    threads, rows = torch.get_num_threads(), []
    for tokens in args.tokens:
        case = model.case(tokens, mesh.device, DTYPES[dtype])
        steps = {s: Ours(m, case, mesh, sp) if sp else Theirs(m, case) for s, (m, sp) in modules.items()}
        seconds = take_turns(steps, mesh, args, threads)
        results = {side: step.prediction() for side, step in steps.items()}
        first = results[args.sides[0]]
        apart = max(((r - first).abs().max() / first.abs().max()).item() for r in results.values())
        ratios = {s: seconds[s] / seconds[peer_of(s)] for s in seconds if s[:4] != "ours" and peer_of(s) in seconds}
        count = case.pack(case.latents).shape[1]
        row = {"dtype": dtype, "tokens": count, "seconds": seconds, "ratios": ratios, "difference": apart}
        rows.append(row)
        if mesh.is_main:
            shown = " ".join(f"{seconds[side]:18.3f}" for side in args.sides)
            print(f"{dtype:5} {count:7d} {shown}   {apart:.1e}  ", end="")
            print(", ".join(f"{side} {ratio:.2f}" for side, ratio in ratios.items()), flush=True)
    return rows


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured where."""
    import diffusers

    options = {name: value for name, value in vars(args).items() if name != "output"}
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    return {"benchmark": "step", "options": options, "device": where, "versions": versions, "date": time.strftime("%F")}


def main() -> None:
    args = parse()
    registered = get_model(args.model)
    model: Model = forks.function(registered, "step")(registered, args.heads, args.depth, args.words)
    if args.ranks > 1 and "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        with tempfile.TemporaryDirectory() as folder:
            model.write(Path(folder))
            environment = os.environ | {"STEP_FOLDER": folder, "OMP_NUM_THREADS": str(os.cpu_count())}
            sys.exit(subprocess.run([*launch, *sys.argv], env=environment).returncode)
    layout = Layout(cfg=args.cfg, ring=args.ring, ulysses=args.ranks // args.cfg // args.ring)
    with tempfile.TemporaryDirectory() as made, distributed(layout, args.device) as mesh:
        folder = Path(os.environ.get("STEP_FOLDER", made))
        if "STEP_FOLDER" not in os.environ:
            model.write(folder)
        if mesh.is_main:
            print(f"{args.model}: {args.heads} heads, {args.depth} blocks, {layout}; {about(args)['device']};", end=" ")
            print(f"medians of {args.rounds} steps, seconds of the {args.clock} clock")
            print(f"{'dtype':5} {'tokens':>7} {' '.join(f'{side:>18}' for side in args.sides)}   difference, ratios")
        rows = [row for dtype in args.dtype for row in measure(args, mesh, model, folder, dtype)]
        if mesh.is_main and args.output is not None:
            args.output.write_text(json.dumps(about(args) | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
