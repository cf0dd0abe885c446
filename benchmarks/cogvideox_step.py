"""Time of one CogVideoX transformer forward and one sampling step on N ranks against diffusers' single-process forward.

    python benchmarks/cogvideox_step.py --kind 5b --ranks 2 --dtype fp32 bf16 --tokens 2000 4000

As `benchmarks/step.py`: both sides hold the same random weights and take turns, medians are printed with their ratio,
diffusers' time over ours. Width and depth are reduced; the text has its full 226 tokens. A step is two forwards,
guidance and a DDIM update; diffusers runs its two forwards as one batch of two, as its pipelines do. What our `prepare`
does once per generation (text projection, positions) is not in a forward; diffusers does it in every one.

`--peer cache-dit` (pip install cache-dit) runs diffusers' model on the same ranks under cache-dit's context
parallelism (Ulysses) instead. It wants text and video tokens and ranks that divide; on the CPU its ring does not run.
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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.step import CLOCKS, DTYPES, Timer
from cogvideox_xdit.config import CONFIGS, TransformerConfig, transformer_config, transformer_json
from cogvideox_xdit.transformer import CogVideoXTransformer, pack, unpack
from cogvideox_xdit.weights import STEM, load_transformer, rename_table
from common.guidance import Guidance
from common.parallel import Layout, Mesh, distributed
from common.usp import SequenceParallel
from common.weights import save

KINDS = ("2b", "5b", "1.5")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="5b")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--cfg", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 4000])
    parser.add_argument("--heads", type=int, default=24, help="the width is 64 times this")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: of all threads of a process")
    parser.add_argument("--peer", choices=["diffusers", "cache-dit"], default="diffusers")
    parser.add_argument("--compile", action="store_true", help="compile each block, ours and theirs")
    return parser.parse_args()


def write_checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """A transformer folder with random weights in fp32, the kind's shape in all but width and depth."""
    config = replace(CONFIGS[args.kind], heads=args.heads, layers=args.depth, sample_height=200, sample_width=200)
    torch.manual_seed(0)
    model = CogVideoXTransformer(config)
    for p in model.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    target = folder / "transformer"
    target.mkdir()
    save(model.state_dict(), target / f"{STEM}.safetensors", rename_table(config))
    (target / "config.json").write_text(json.dumps(transformer_json(config)))


def size_of(config: TransformerConfig, tokens: int) -> tuple[int, int, int]:
    """Latent (T, H, W) of about that many tokens, shaped like 720x480 video."""
    h = max(2, round(math.sqrt(tokens / 4 / 1.5)))
    w = max(2, round(h * 1.5 / 4) * 4)  # a number that peers can divide
    return max(1, round(tokens / (h * w))) * config.patch[0], 2 * h, 2 * w


class Case:
    """One size: the inputs, our forward and step, and diffusers'."""

    def __init__(self, model: CogVideoXTransformer, theirs: nn.Module | None, mesh: Mesh, tokens: int) -> None:
        self.model, self.theirs, self.sp = model, theirs, model.sp
        config = model.config
        self.size = size_of(config, tokens)
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, config.out_channels, *self.size, generator=generator).to(mesh.device)
        shape = (2, config.text_length, config.text_dim)
        self.text = torch.randn(shape, generator=generator).to(mesh.device)
        self.t = torch.full((1,), 499, device=mesh.device)
        self.tokens = pack(self.latents, config.patch)
        self.x = self.sp.shard(self.tokens)
        self.conds = [model.prepare(self.text[i : i + 1], self.size) for i in range(2)]
        self.guide = Guidance(mesh.cfg)
        self.rope = self._their_rope() if theirs is not None and config.rotary else None

    def _their_rope(self) -> tuple[Tensor, Tensor]:
        """Made once for a generation there too."""
        from diffusers import CogVideoXPipeline

        pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=self.theirs)
        frames, rows, columns = self.size
        return CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipe, rows * 8, columns * 8, frames, self.latents.device
        )

    def forward(self) -> Tensor:
        return self.model(self.x, self.t, self.conds[0])

    def step(self) -> Tensor:
        v = self.guide(lambda branch: self.model(self.x, self.t, self.conds[branch]), 6.0)
        return 0.98 * self.x - 0.02 * v

    def their_forward(self, batch: int = 1) -> Tensor:
        assert self.theirs is not None
        dtype = self.theirs.proj_out.weight.dtype
        x = self.latents.transpose(1, 2).to(dtype).expand(batch, -1, -1, -1, -1)
        text, t = self.text[:batch].to(dtype), self.t.expand(batch)
        out = self.theirs(x, text, t, image_rotary_emb=self.rope, return_dict=False)[0]
        return out.transpose(1, 2)

    def their_step(self) -> Tensor:
        good, bad = self.their_forward(batch=2).float().chunk(2)
        return 0.98 * self.latents - 0.02 * (bad + 6.0 * (good - bad))

    def difference(self) -> float:
        """Largest difference between the two forwards over the largest value; collective."""
        patch, lengths = self.model.config.patch, self.sp.lengths(self.tokens.shape[1])
        ours = unpack(self.sp.gather(self.forward().float(), lengths), self.size, patch)
        if self.theirs is None:
            return 0.0
        theirs = self.their_forward().float()
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def take_turns(case: Case, mesh: Mesh, args: argparse.Namespace, threads: int) -> dict[str, float]:
    """Medians of the four calls after one round that is not counted; a peer on all ranks shares the cores as we do."""
    timer, on_ranks = Timer(mesh, args.clock), args.peer == "cache-dit"
    seconds: dict[str, list[float]] = {name: [] for name in ("forward", "their_forward", "step", "their_step")}
    for _ in range(args.rounds + 1):
        for name, times in seconds.items():
            alone = name.startswith("their") and not on_ranks
            torch.set_num_threads(threads if alone else max(1, threads // mesh.layout.ranks))
            call = getattr(case, name)
            times.append(timer(call if case.theirs is not None or not alone else lambda: case.x))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def spread_with_cache_dit(model: nn.Module, mesh: Mesh) -> None:
    """Split diffusers' model over the mesh as cache-dit does it."""
    import cache_dit

    config = cache_dit.ParallelismConfig(ulysses_size=mesh.layout.ranks)
    cache_dit.enable_cache(model, cache_config=None, parallelism_config=config)


@torch.no_grad()
def measure(args: argparse.Namespace, mesh: Mesh, folder: Path, dtype: str) -> None:
    from diffusers import CogVideoXTransformer3DModel

    config = transformer_config(json.loads((folder / "transformer" / "config.json").read_text()))
    model = load_transformer(folder, config, SequenceParallel(mesh), mesh.device, DTYPES[dtype])
    theirs = None
    on_ranks = args.peer == "cache-dit"
    if mesh.is_main or on_ranks:
        theirs = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=DTYPES[dtype])
        theirs = theirs.to(mesh.device).eval()
    if on_ranks:
        spread_with_cache_dit(theirs, mesh)
    if args.compile:
        for block in [*model.blocks, *(theirs.transformer_blocks if theirs else [])]:
            block.compile()
    threads = torch.get_num_threads()
    for tokens in args.tokens:
        case = Case(model, theirs, mesh, tokens)
        times = take_turns(case, mesh, args, threads)
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
            print(f"{args.kind}: {args.heads} heads, {args.depth} blocks; medians of {args.rounds}, {args.clock} clock")
            print(
                f"{'dtype':5} {'tokens':>7} {'forward s':>10} {args.peer:>10} {'ratio':>7}"
                f" {'step s':>10} {args.peer:>10} {'ratio':>7}   difference"
            )
        for dtype in args.dtype:
            measure(args, mesh, Path(folder), dtype)


if __name__ == "__main__":
    main()
