"""Time of one transformer forward and one sampling step on N ranks against diffusers' single-process forward.

    python benchmarks/step.py --ranks 2 --dtype bf16 --tokens 2000 4000 8000

Both sides hold the same random weights (ours reads the file diffusers reads) and take turns; medians are printed with
their ratio, diffusers' time over ours. Width and depth are reduced so that a laptop can hold both; the ratio of a
forward is that of its blocks, which repeat. A step is two forwards (prompt and empty prompt), guidance and an Euler
update. What our `prepare` does once per generation is not in a forward; diffusers does it in every one.

On the CPU, N ranks share the cores that diffusers has for itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.guidance import Guidance
from common.parallel import Layout, Mesh, distributed
from common.usp import SequenceParallel
from common.weights import save
from mochi_xdit.config import MochiConfig
from mochi_xdit.transformer import MochiTransformer, pack, unpack
from mochi_xdit.weights import load_transformer, transformer_rename

TEXT_DIM = 512
"""Of 4096: the pool over the text runs once a forward in diffusers, and with few blocks it would weigh too much."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--cfg", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 4000, 8000])
    parser.add_argument("--words", type=int, default=256, help="valid text tokens of 256")
    parser.add_argument("--heads", type=int, default=12, help="of 24; the width is 128 times this")
    parser.add_argument("--depth", type=int, default=2, help="of 48 blocks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--clock", default="wall", choices=CLOCKS, help="cpu: of all threads, for a busy machine, one rank"
    )
    parser.add_argument("--compile", action="store_true", help="compile each block, ours and theirs")
    return parser.parse_args()


def write_checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """A diffusers folder with random weights in fp32, Mochi's shape in all but width and depth."""
    width = 128 * args.heads
    config = MochiConfig(
        depth=args.depth,
        heads=args.heads,
        hidden_y=width // 2,
        mlp_x=8 * width // 3,
        mlp_y=4 * width // 3,
        text_dim=TEXT_DIM,
    )
    torch.manual_seed(0)
    model = MochiTransformer(config)
    for p in model.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    target = folder / "transformer"
    target.mkdir()
    save(model.state_dict(), target / "diffusion_pytorch_model.safetensors", transformer_rename(config))
    numbers = {"num_layers": args.depth, "num_attention_heads": args.heads, "pooled_projection_dim": width // 2}
    numbers |= {"text_embed_dim": TEXT_DIM, "_class_name": "MochiTransformer3DModel"}
    (target / "config.json").write_text(json.dumps(numbers))


def size_of(tokens: int) -> tuple[int, int, int]:
    """Latent (T, H, W) of about that many tokens, shaped like 848x480 video."""
    h = max(2, round(math.sqrt(tokens / 4 * 30 / 53)))
    w = max(2, round(h * 53 / 30))
    return max(1, round(tokens / (h * w))), 2 * h, 2 * w


class Timer:
    """Seconds of a call on the slowest rank, synchronised before and after."""

    def __init__(self, mesh: Mesh, clock: str) -> None:
        self.mesh, self.clock = mesh, CLOCKS[clock]

    def __call__(self, call: Callable[[], Tensor]) -> float:
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


class Case:
    """One size: the inputs, our forward and step, and diffusers'."""

    def __init__(self, model: MochiTransformer, theirs: nn.Module | None, mesh: Mesh, tokens: int, words: int) -> None:
        self.model, self.theirs, self.sp = model, theirs, model.sp
        self.size = size_of(tokens)
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, 12, *self.size, generator=generator).to(mesh.device)
        self.text = torch.randn(1, 256, TEXT_DIM, generator=generator).to(mesh.device)
        self.mask = (torch.arange(256) < words)[None].to(mesh.device)
        self.none = torch.zeros_like(self.mask)
        self.t = torch.full((1,), 250.0, device=mesh.device)
        self.tokens = pack(self.latents)
        self.x = self.sp.shard(self.tokens)
        self.conds = (model.prepare(self.size, self.text, self.mask), model.prepare(self.size))
        self.guide = Guidance(mesh.cfg)

    def forward(self) -> Tensor:
        return self.model(self.x, self.t, self.conds[0])

    def step(self) -> Tensor:
        return self.x + 0.02 * self.guide(lambda branch: self.model(self.x, self.t, self.conds[branch]), 4.5)

    def their_forward(self, mask: Tensor | None = None) -> Tensor:
        dtype = self.theirs.proj_out.weight.dtype
        mask = self.mask if mask is None else mask
        return self.theirs(self.latents.to(dtype), self.text.to(dtype), self.t, mask, return_dict=False)[0]

    def their_step(self) -> Tensor:
        good, bad = self.their_forward().float(), self.their_forward(self.none).float()
        return self.latents + 0.02 * (bad + 4.5 * (good - bad))

    def difference(self) -> float:
        """Largest difference between the two forwards over the largest value; collective."""
        ours = unpack(self.sp.gather(self.forward(), self.sp.lengths(self.tokens.shape[1])), self.size)
        if self.theirs is None:
            return 0.0
        theirs = self.their_forward().float()
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare(case: Case, mesh: Mesh, args: argparse.Namespace, threads: int) -> dict[str, float]:
    """Medians of the four calls, taken in turns after one round that is not counted."""
    timer = Timer(mesh, args.clock)
    seconds: dict[str, list[float]] = {name: [] for name in ("forward", "their_forward", "step", "their_step")}
    for _ in range(args.rounds + 1):
        for name, times in seconds.items():
            theirs = name.startswith("their")
            torch.set_num_threads(threads if theirs else max(1, threads // mesh.layout.ranks))
            call = getattr(case, name)
            times.append(timer(call if case.theirs is not None or not theirs else lambda: case.x))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


@torch.no_grad()
def measure(args: argparse.Namespace, mesh: Mesh, folder: Path, dtype: str) -> None:
    from diffusers import MochiTransformer3DModel

    model = load_transformer(folder, SequenceParallel(mesh), mesh.device, DTYPES[dtype])
    theirs = None
    if mesh.is_main:
        theirs = MochiTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=DTYPES[dtype])
        theirs = theirs.to(mesh.device).eval()
    if args.compile:
        for block in [*model.blocks, *(theirs.transformer_blocks if theirs else [])]:
            block.compile()
    threads = torch.get_num_threads()
    for tokens in args.tokens:
        case = Case(model, theirs, mesh, tokens, args.words)
        times = compare(case, mesh, args, threads)
        apart = case.difference()
        if mesh.is_main:
            ours, peer, step, their_step = (times[k] for k in ("forward", "their_forward", "step", "their_step"))
            print(
                f"{dtype:5} {case.tokens.shape[1]:7d} {ours:10.3f} {peer:10.3f} {peer / ours:7.2f}"
                f" {step:10.3f} {their_step:10.3f} {their_step / step:7.2f}   {apart:.1e}",
                flush=True,
            )


def main() -> None:
    args = parse()
    if args.ranks > 1 and "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), args)
            environment = os.environ | {"STEP_FOLDER": folder, "OMP_NUM_THREADS": str(os.cpu_count())}
            sys.exit(subprocess.run([*launch, *sys.argv], env=environment).returncode)
    layout = Layout(cfg=args.cfg, ring=args.ring, ulysses=args.ranks // args.cfg // args.ring)
    with tempfile.TemporaryDirectory() as folder, distributed(layout, args.device) as mesh:
        if "STEP_FOLDER" in os.environ:
            folder = os.environ["STEP_FOLDER"]
        else:
            write_checkpoint(Path(folder), args)
        if mesh.is_main:
            print(f"{mesh.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {layout};")
            print(f"{args.heads} heads, {args.depth} blocks, {args.words} of 256 text tokens;", end=" ")
            print(f"medians of {args.rounds}, {args.clock} clock")
            print(
                f"{'dtype':5} {'tokens':>7} {'forward s':>10} {'diffusers':>10} {'ratio':>7}"
                f" {'step s':>10} {'diffusers':>10} {'ratio':>7}   difference"
            )
        for dtype in args.dtype:
            measure(args, mesh, Path(folder), dtype)


if __name__ == "__main__":
    main()
