"""Memory of one rank in each stage of Mochi, counted without weights or GPUs.

    python benchmarks/memory.py --width 848 --height 480 --num-frames 49 --cfg 2 --ring 4

Weights are those of the module in bf16. Activations are the peak of the tensors alive at once in one block, counted by
running it on the meta device as rank 0 of the layout would (the ring's attention, whose kernel keeps no scores). Not
counted: the CUDA context (about 0.5 GB), NCCL's buffers and the allocator's rounding.
"""

from __future__ import annotations

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

from common.decode import PeakMemory, decode_memory, decode_plans
from common.parallel import Axis, Layout, Mesh
from common.text import new_t5
from common.usp import SequenceParallel
from common.weights import on_meta
from mochi_xdit.transformer import MochiTransformer
from mochi_xdit.vae import MochiDecoder

T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
}
PROMPT_TOKENS = 256


def weights(module: torch.nn.Module) -> int:
    """Bytes in bf16."""
    return 2 * sum(p.numel() for p in module.parameters())


def first_rank(layout: Layout) -> Mesh:
    """Rank 0's mesh over process groups that send nothing."""
    dist.init_process_group("fake", rank=0, world_size=layout.ranks, store=FakeStore())
    names = ("cfg", "ring", "ulysses")
    mesh = dist.init_device_mesh("cpu", tuple(getattr(layout, n) for n in names), mesh_dim_names=names)
    axes = {n: Axis(getattr(layout, n), 0, mesh[n].get_group()) for n in names}
    sequence = Axis(layout.sequence, 0, mesh["ring", "ulysses"]._flatten("sequence").get_group())
    return Mesh(layout=layout, world=Axis(layout.ranks, 0, dist.group.WORLD), sequence=sequence, **axes)


@torch.inference_mode()
def sampling(layout: Layout, latents: tuple[int, int, int]) -> tuple[int, int]:
    """(weights, activations) of one rank while it samples, in bytes."""
    sp = SequenceParallel(first_rank(layout))
    model = on_meta(MochiTransformer, sp=sp).to(torch.bfloat16)
    cond = model.prepare(latents, torch.empty(1, PROMPT_TOKENS, model.config.text_dim, device="meta"))
    n = cond.lengths[0] - cond.y.shape[1]
    x = torch.empty(1, n, model.config.hidden_x, dtype=torch.bfloat16, device="meta")
    c = torch.empty(1, model.config.hidden_x, dtype=torch.bfloat16, device="meta")
    with PeakMemory() as peak:
        model.blocks[0](x, cond.y, c, cond)
    held = sum(t.numel() * t.element_size() for t in (x, cond.y, cond.rope))
    return weights(model), peak.peak + held


@click.command()
@click.option("--width", default=848)
@click.option("--height", default=480)
@click.option("--num-frames", default=49)
@click.option("--cfg", default=2)
@click.option("--ring", default=4, help="At least 2: see above.")
@click.option("--ulysses", default=1)
def main(width: int, height: int, num_frames: int, cfg: int, ring: int, ulysses: int) -> None:
    latents = ((num_frames - 1) // 6 + 1, height // 8, width // 8)
    layout = Layout(cfg, ring, ulysses)
    title = f"Mochi {width}x{height}x{num_frames}, {layout}, rank 0"
    table = Table("stage", "weights GB", "activations GB", "sum GB", title=title)
    t5 = new_t5(T5_XXL)
    rows = {"text (rank 0 only)": (weights(t5), 0), "sampling": sampling(layout, latents)}
    decoder = on_meta(MochiDecoder).to(torch.bfloat16)
    for plan in decode_plans(decoder, (12, *latents), layout.ranks)[:4]:
        peak = decode_memory(decoder, (12, *latents), plan)
        rows[f"decode: {plan}"] = (weights(decoder), peak)
    for name, (held, used) in rows.items():
        table.add_row(name, *(f"{value / 1e9:.2f}" for value in (held, used, held + used)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
