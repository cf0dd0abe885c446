"""`python -m tools.demo.lossy`: what each option costs on a trained demo, written to docs/fidelity.md.

Lossy options: the evaluation's figures, and the PSNR of their frames against fp32's. Exact options: whether frames are
equal to one process's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from common.parallel.mesh import Layout, Mesh, distributed
from common.registry.settings import DecodeOptions
from mochi_xdit.transformer import pack
from tools.demo.evaluate import FRAMES, READ, evaluate, generator, pipeline, rules

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs" / "fidelity.md"
RESULTS = ROOT / "benchmarks" / "results" / "fidelity.json"
NAMES = {"mochi": "Mochi", "cogvideox": "CogVideoX", "consisid": "ConsisID", "wan": "Wan"}
DEFAULT, RESIDUAL = "`--dtype bf16` (the default)", "`--residual bf16`"
LOSSY: dict[str, dict[str, Any]] = {
    "fp32 (what the others are measured against)": {"dtype": "fp32"},
    DEFAULT: {"dtype": "bf16"},
    "`--dtype fp8`": {"dtype": "fp8"},
    "`--dtype fp8 --text-dtype fp8`": {"dtype": "fp8", "text_dtype": "fp8"},
    "`--dtype bf16 --vae tiled --vae-tile 32`": {"dtype": "bf16", "vae": "tiled", "vae_tile": 32},
}
ONLY: dict[str, dict[str, dict[str, Any]]] = {
    "wan": {
        RESIDUAL: {"dtype": "bf16", "residual": "bf16"},
    },
}
"""Options that one model has."""
EXACT: dict[str, tuple[Layout, dict[str, Any]]] = {
    "`--vae-chunk 1`": (Layout(), {"vae_chunk": 1}),
    "`--offload block`": (Layout(), {"offload": "block"}),
    "`--offload disk`": (Layout(), {"offload": "disk"}),
    "cfg 2": (Layout(cfg=2), {}),
    "ulysses 2": (Layout(ulysses=2), {}),
    "ring 3": (Layout(ring=3), {}),
    "cfg 2 x ulysses 2": (Layout(cfg=2, ulysses=2), {}),
    "ring 3, `--shard-weights`": (Layout(ring=3), {"shard_weights": True}),
    "ring 3, `--shard-weights --offload block`": (Layout(ring=3), {"shard_weights": True, "offload": "block"}),
}
ROUNDED = ("cfg 2", "ulysses 2", "ring 3")
"""Those of EXACT that are measured in bf16 too."""
PROMPTS = ("A big red circle moves slowly to the right on a black background.", "A small blue cross glides up.")
DECODING = ("vae", "vae_tile", "vae_chunk")


def maker(model: str, options: dict[str, Any], mesh: Mesh | None = None) -> Callable[[str, int], Tensor]:
    """From prompt and seed to frames, with these options and the demo's own steps."""
    decoding = {name: value for name, value in options.items() if name in DECODING}
    rest = {name: value for name, value in options.items() if name not in DECODING}
    folder, own = rules(model)
    pipe = pipeline(model, folder, mesh, **rest)
    decode = DecodeOptions(**decoding)
    return generator(model, pipe, num_steps=own.num_steps, cfg_scale=own.cfg_scale, decode=decode)


def psnr(a: Tensor, b: Tensor) -> float:
    error = (a.float() - b.float()).square().mean()
    return float("inf") if not error else float(10 * torch.log10(255**2 / error))


def lossy(model: str, count: int) -> dict[str, Any]:
    """For every lossy option the evaluation's shares and the mean PSNR against the first."""
    rows: dict[str, Any] = {}
    wanted: list[Tensor] = []
    for name, options in (LOSSY | ONLY.get(model, {})).items():
        made: list[Tensor] = []
        make = maker(model, options)

        def generate(text: str, seed: int, make=make, made=made) -> Tensor:
            made.append(make(text, seed))
            return made[-1]

        shares = evaluate(generate, count, FRAMES[model])["right"]
        wanted = wanted or made
        values = [psnr(a, b) for a, b in zip(made, wanted, strict=True)]
        rows[name] = {"right": shares, "psnr": sum(values) / len(values), "worst": min(values)}
        print(name, rows[name], flush=True)
    return rows


def forward_error() -> float:
    """Relative error of a prediction of Mochi's fp8 transformer against the bf16 one's, half way through the noise."""
    outputs = []
    for dtype in ("bf16", "fp8"):
        pipe = pipeline("mochi", rules("mochi")[0], dtype=dtype)
        text = pipe._encode(PROMPTS[0], None)[0]
        with torch.inference_mode(), pipe.stage_model("transformer", pipe.load_transformer) as model:
            latents = torch.randn(1, 12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            cond = model.prepare((3, 8, 8), *text)
            outputs.append(model(pack(latents), torch.tensor([500.0]), cond))
    return float((outputs[1] - outputs[0]).norm() / outputs[0].norm())


def _rank(rank: int, port: int, model: str, name: str, dtype: str, target: str) -> None:
    torch.set_num_threads(1)
    layout, options = EXACT[name]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(layout.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed(layout) as mesh:
        make = maker(model, {"dtype": dtype, **options}, mesh)
        frames = [make(prompt, 1) for prompt in PROMPTS]
        if rank == 0:
            torch.save(frames, target)


def exact(model: str, scratch: Path, dtype: str = "fp32", names: Sequence[str] = tuple(EXACT)) -> dict[str, Any]:
    """For exact options in a dtype, how far two videos are from one process's: the largest difference of a value, of
    255, the share of values that differ, and the PSNR of the farther video."""
    make = maker(model, {"dtype": dtype})
    wanted = [make(prompt, 1) for prompt in PROMPTS]
    rows = {}
    for name in names:
        layout, _ = EXACT[name]
        if "vae-chunk" in name and model in ("cogvideox", "consisid"):  # their chunks are part of the model
            continue
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        file = scratch / "frames.pt"
        spawn(_rank, (port, model, name, dtype, str(file)), layout.ranks)
        pairs = list(zip(torch.load(file), wanted, strict=True))
        file.unlink()
        far = [(a.int() - b.int()).abs() for a, b in pairs]
        near = min(psnr(a, b) for a, b in pairs)
        rows[name] = {
            "largest": max(int(d.max()) for d in far),
            "share": sum(float((d > 0).float().mean()) for d in far) / 2,
            "psnr": None if near == float("inf") else near,
        }
        print(name, rows[name], flush=True)
    return rows


def page(found: dict[str, Any]) -> str:
    """The whole page from what was measured, model by model."""
    lines = [
        "# Fidelity: what each option costs",
        "",
        "Made by `python -m tools.demo.lossy --model ...` on the trained demo checkpoints, with held-out captions and "
        "the demos' own steps and guidance. Small models are severe judges: their matrices are narrow, so rounding "
        "averages out less than in the official ones, of which there were no weights at hand.",
        "",
        "The default dtype on GPUs is the one that a checkpoint was published in: bf16, of CogVideoX-2b fp16; "
        "everything below it is opt-in. On the CPU the default is fp32: not every CPU has instructions for half "
        "precision. PSNR compares whole videos from the same seed. Sampling amplifies small differences, so a low "
        "figure with unchanged shares means another equally good video of the prompt.",
        "",
        "Exact options are compared with one process with everything loaded, two prompts. Layouts change the order of "
        "floating point sums. In fp32 that may turn a value at the edge of rounding by one grey level. In bf16 sums "
        "are rounded to 8 bits, the steps amplify what that makes of another order, and a split of the sequence (ring, "
        "ulysses) agrees with one process as two attention kernels agree on one GPU; cfg alone changes no order.",
        "",
        "On a CPU fp8 means weights in float8 and arithmetic in bf16; where the GPU multiplies fp8 matrices, "
        "activations are rounded too; that adds to it and was not measured. One prediction of Mochi's fp8 transformer "
        f"differs from the bf16 one's by {100 * found['forward']:.1f} % (relative Euclidean norm, t = 500).",
    ]
    if "wan" in found:
        lines += ["", _residual(found["wan"]["lossy"])]
    for model in (m for m in FRAMES if m in found):
        lines += ["", *_section(NAMES[model], found[model])]
    return "\n".join(lines) + "\n"


def _residual(rows: dict[str, Any]) -> str:
    wide, narrow = (rows[name]["psnr"] for name in (DEFAULT, RESIDUAL))
    return (
        "Between Wan's blocks the authors' program sums up in fp32, and so does `--residual fp32`, the default; with "
        "`--residual bf16` the sums are rounded to bf16 after every block. On the demo the two are "
        f"{wide:.1f} dB and {narrow:.1f} dB from fp32's videos."
    )


def _section(name: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"## {name}",
        "",
        f"{found['count']} captions, {found['machine']}, {found['date']}.",
        "",
        "| lossy option | PSNR to fp32 (mean, worst) | " + " | ".join(READ) + " |",
        "|---|---|" + "---|" * len(READ),
    ]
    for option, row in found["lossy"].items():
        near = "-" if row["psnr"] == float("inf") else f"{row['psnr']:.1f} dB, {row['worst']:.1f} dB"
        lines.append(f"| {option} | {near} | " + " | ".join(f"{100 * row['right'][f]:.0f} %" for f in READ) + " |")
    both = {"fp32": found["exact"], "bf16": found.get("rounded", {})}
    for dtype, rows in both.items():
        if not rows:
            continue
        lines += ["", f"| exact option, {dtype} | largest difference (of 255) | share of values that differ | PSNR |"]
        lines.append("|---|---|---|---|")
        for option, row in rows.items():
            lines.append(f"| {option} | {row['largest']} | {100 * row['share']:.4f} % | {_near(row)} |")
    return lines


def _near(row: dict[str, Any]) -> str:
    """The PSNR; of differences of one grey level it follows from their share."""
    if row["largest"] == 0:
        return "the same"
    return f"{row.get('psnr') or 10 * math.log10(255**2 / row['share']):.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.lossy", description=__doc__)
    parser.add_argument("--model", choices=list(FRAMES), required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--scratch", type=Path, default=Path("."), help="where a file of frames may lie for a while")
    parser.add_argument("--rounded", action="store_true", help="only the layouts in bf16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
    model, forward, mine = arguments.model, {}, {}
    if not arguments.rounded:
        mine = {"count": arguments.count, "machine": machine, "date": time.strftime("%Y-%m-%d")}
        mine |= {"lossy": lossy(model, arguments.count), "exact": exact(model, arguments.scratch)}
        forward = {"forward": forward_error()} if model == "mochi" else {}
    mine["rounded"] = exact(model, arguments.scratch, "bf16", ROUNDED)
    # Read last, so that two models can be measured at the same time.
    found = json.loads(RESULTS.read_text()) | forward
    found[model] = found.get(model, {}) | mine
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    TARGET.write_text(page(found))


if __name__ == "__main__":
    main()
