"""From noise to latents: the loop, and the same for one step on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.memory.estimate import Workload
from common.parallel.mesh import Mesh
from common.parallel.usp import SequenceParallel
from common.registry.forks import Model, Size
from common.video.latents import require_finite
from common.weights.load import on_meta
from common.weights.schema import read_object
from toy_xdit.config import LATENTS, Config, Sound, read_config
from toy_xdit.text import text_work
from toy_xdit.transformer import Condition, ToyTransformer, pack
from toy_xdit.vae import ToyDecoder

LLAMA = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def sample(
    model: ToyTransformer, z: Tensor, s: Tensor, cond: Condition, steps: range, total: int, step: Callable[[], object]
) -> tuple[Tensor, Tensor]:
    """Some of `total` Euler steps from noise (time 1) to data (time 0), on this rank's tokens."""
    for i in steps:
        dz, ds = model(z, s, 1 - i / total, cond)
        z, s = z + dz / total, s + ds / total
        require_finite(z, f"sampling step {i + 1} of {total}")
        step()
    return z, s


def workload(
    source: Path | Model,
    size: Size,
    mesh: Mesh,
    dtype: torch.dtype = torch.bfloat16,
    negative: bool = False,
    text_encoder_dir: str | Path | None = None,
) -> Workload:
    """What one rank runs for one video, for `common.memory.estimate`."""
    config, llama = Config(), LLAMA
    if isinstance(source, Path):
        config = read_config(source)
        llama = read_object(Path(text_encoder_dir or source / "text_encoder") / "config.json")
    latents, sp = (config.channels, *LATENTS.decoded(size)), SequenceParallel(mesh)
    sound = Sound().tokens(size)[0]

    def step(model: ToyTransformer) -> object:
        z = pack(torch.empty(1, *latents, device="meta"))
        s = torch.empty(1, sound, config.sound_channels, device="meta")
        cond = model.prepare(torch.empty(1, config.text_tokens, config.text_dim, device="meta"), z.shape[1], sound)
        z, s = sample(model, sp.shard(z), sp.shard(s), cond, range(1), 1, lambda: None)
        return sp.gather(z, sp.lengths(LATENTS.tokens(size)[0]))

    return Workload(
        on_meta(ToyTransformer, config, sp),
        step,
        on_meta(ToyDecoder, config),
        latents,
        (size.num_frames, size.height, size.width),
        (text_work(llama, config.text_tokens),),
        experts=2,
    )
