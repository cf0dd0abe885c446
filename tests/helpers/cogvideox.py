"""Small random CogVideoX models of all five kinds, ours and the installed reference, with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from cogvideox_xdit.config import CONFIGS, TransformerConfig, VAEConfig, transformer_json
from cogvideox_xdit.demo import random_checkpoint, scaling
from cogvideox_xdit.transformer import CogVideoXTransformer, pack, unpack
from cogvideox_xdit.weights import rename_table
from common.parallel.usp import SequenceParallel
from common.weights.load import load, on_meta, open_checkpoint

if TYPE_CHECKING:  # the ranks of the pool import this file, and the reference takes seconds to import
    from diffusers import CogVideoXTransformer3DModel

KINDS = tuple(CONFIGS)
SIZES = {  # latent frames, rows and columns; the first is the one the small checkpoint "was trained on"
    "2b": ((3, 8, 12), (1, 6, 10), (4, 14, 6)),
    "5b": ((3, 8, 12), (1, 6, 10), (4, 14, 6), (2, 12, 14)),
    "5b-i2v": ((3, 8, 12), (2, 8, 12)),
    "1.5": ((2, 8, 12), (4, 14, 6)),
    "1.5-i2v": ((2, 8, 12), (4, 6, 10)),
}
TEXT = 7


def small(kind: str, **changes: object) -> TransformerConfig:
    """A model of `kind` with three narrow heads; 1.5's sample is large, as the reference slices its grid out of it."""
    sample = {"sample_height": 28, "sample_width": 28} if kind.startswith("1.5") else {}
    numbers = {
        "heads": 3,
        "head_dim": 16,
        "layers": 2,
        "text_dim": 12,
        "text_length": TEXT,
        "time_dim": 8,
        "ofs_dim": 8 if CONFIGS[kind].ofs_dim else None,
        "in_channels": 4 * CONFIGS[kind].in_channels // 16,
        "out_channels": 4,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 9,
    }
    return replace(CONFIGS[kind], **(numbers | sample | changes))


def reference(config: TransformerConfig, seed: int = 0) -> CogVideoXTransformer3DModel:
    """The installed model in fp64 with every weight random, modulation and norms included."""
    from diffusers import CogVideoXTransformer3DModel

    raw = {key: value for key, value in transformer_json(config).items() if not key.startswith("_")}
    model = CogVideoXTransformer3DModel(**raw).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if p.ndim == 1 else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale + ("norm" in name and p.ndim == 1))
        if config.learned:
            table = model.patch_embed.pos_embedding
            table.copy_(torch.randn(table.shape, generator=generator, dtype=table.dtype))
    return model


def stored(model: CogVideoXTransformer3DModel, folder: Path) -> Path:
    """The reference's weights as a file in its own layout."""
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def ours(config: TransformerConfig, path: Path, sp: SequenceParallel | None = None) -> CogVideoXTransformer:
    model = on_meta(CogVideoXTransformer, config, sp)
    return load(model, open_checkpoint(path), rename_table(config))  # type: ignore[return-value]


def inputs(config: TransformerConfig, size: tuple[int, int, int], batch: int = 1, seed: int = 1) -> dict[str, Tensor]:
    """Arguments of `denoise` in fp64: latents, text, a step for each sample and the image where one is needed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {
        "latents": draw(batch, config.out_channels, *size),
        "text": draw(batch, config.text_length, config.text_dim),
        "t": torch.tensor([999, 41, 500][:batch]),
    }
    if config.image_channels:
        made["image"] = draw(batch, config.image_channels, *size)
    return made


def denoise(
    model: CogVideoXTransformer,
    latents: Tensor,
    text: Tensor,
    t: Tensor | float,
    image: Tensor | None = None,
    **more: object,
) -> Tensor:
    """`prepare` and one `forward` on full latents (B, C, T, H, W), for all ranks' tokens; the same on every rank.

    more: what else `prepare` takes.
    """
    size = (latents.shape[2], latents.shape[3], latents.shape[4])
    cond = model.prepare(text, size, image, **more)  # type: ignore[arg-type]
    x = pack(latents, model.config.patch)
    out = model(model.sp.shard(x), t, cond)
    return unpack(model.sp.gather(out, model.sp.lengths(x.shape[1])), size, model.config.patch)


def reference_output(model: CogVideoXTransformer3DModel, given: dict[str, Tensor]) -> Tensor:
    """What the installed model says to the same arguments, in our order of axes."""
    from diffusers import CogVideoXPipeline

    config = model.config
    x = given["latents"]
    if "image" in given:
        x = torch.cat((x, given["image"].expand_as(x)), dim=1)
    rope = None
    if config.use_rotary_positional_embeddings:
        pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=model)
        rope = CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipe, x.shape[3] * 8, x.shape[4] * 8, x.shape[2], torch.device("cpu")
        )
    ofs = torch.full((1,), 2.0) if config.ofs_embed_dim else None
    with torch.no_grad(), wide_rope():
        out = model(x.transpose(1, 2), given["text"], given["t"], ofs=ofs, image_rotary_emb=rope).sample
    return out.transpose(1, 2)


@contextmanager
def wide_rope() -> Iterator[None]:
    """The reference turns q and k in fp32 whatever their dtype; here in their own, so that fp64 can be compared."""
    import diffusers.models.embeddings as reference_embeddings

    def apply(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (table.to(x.dtype) for table in tables)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin

    before = reference_embeddings.apply_rotary_emb
    reference_embeddings.apply_rotary_emb = apply
    try:
        yield
    finally:
        reference_embeddings.apply_rotary_emb = before


TINY_VAE = VAEConfig(
    channels=(16, 16, 16, 16), latent_channels=4, layers=1, groups=4, sample_height=64, sample_width=96
)


def write_checkpoint(folder: Path, kind: str, **changes: object) -> Path:
    """A whole small checkpoint of a kind in fp32 (the text encoder in bf16), with the kind's published scaling."""
    vae = replace(TINY_VAE, **scaling(kind))
    config = small(kind, text_dim=32, text_length=16, **changes)
    random_checkpoint(folder, kind, config, vae, torch.float32)
    return folder


def clip(frames: int, height: int = 48, width: int = 32) -> np.ndarray:
    """A random video (T, H, W, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
