"""Weights in the official (diffusers) layout, both ways: see `common.weights.load` for what a table means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cogvideox_xdit.config import TransformerConfig, VAEConfig, read_checkpoint
from common.parallel.mesh import Axis
from common.parallel.usp import SequenceParallel
from common.run.quantize import TransformerFiles
from common.weights.load import Checkpoint, Concat, Progress, Rename, check, find_files, load, on_meta, open_checkpoint
from common.weights.placement import Placement, place

if TYPE_CHECKING:
    from cogvideox_xdit.transformer import CogVideoXTransformer
    from cogvideox_xdit.vae import CogVideoXDecoder, CogVideoXEncoder

STEM = "diffusion_pytorch_model"

_TOP = {
    "patch": "patch_embed.proj",
    "text_in": "patch_embed.text_proj",
    "time.0": "time_embedding.linear_1",
    "time.2": "time_embedding.linear_2",
    "norm_final": "norm_final",
    "norm_out": "norm_out.norm",
    "mod_out": "norm_out.linear",
    "head": "proj_out",
}
_OFS = {"ofs.0": "ofs_embedding.linear_1", "ofs.2": "ofs_embedding.linear_2"}
_BLOCK = {
    "norm1": "norm1.norm",
    "mod1": "norm1.linear",
    "q_norm": "attn1.norm_q",
    "k_norm": "attn1.norm_k",
    "out": "attn1.to_out.0",
    "norm2": "norm2.norm",
    "mod2": "norm2.linear",
    "ff_in": "ff.net.0.proj",
    "ff_out": "ff.net.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def rename_table(config: TransformerConfig) -> Rename:
    """Our modules -> theirs. q, k and v are one matrix here and three there."""
    table: dict[str, str | Concat] = dict(_TOP)  # type: ignore[arg-type]
    if config.ofs_dim:
        table |= _OFS
    if config.learned:
        table["positions"] = "patch_embed.pos_embedding"
    for i in range(config.layers):
        theirs = f"transformer_blocks.{i}"
        table |= {f"blocks.{i}.{ours}": f"{theirs}.{name}" for ours, name in _BLOCK.items()}
        table[f"blocks.{i}.qkv"] = Concat(tuple(f"{theirs}.{name}" for name in _QKV))
    return table


def load_transformer(
    folder: Path,
    config: TransformerConfig,
    sp: SequenceParallel | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    placement: Placement | None = None,
    world: Axis | None = None,
) -> CogVideoXTransformer:
    """The transformer of a checkpoint folder on `device`.

    See `common.weights.load.load` for memory and errors, and `common.weights.placement.place` for placement and world.
    """
    from cogvideox_xdit.transformer import CogVideoXTransformer

    checkpoint = open_checkpoint(find_files(folder / "transformer", STEM, dtype))
    model = on_meta(CogVideoXTransformer, config, sp)
    return place(model, checkpoint, rename_table(config), device, dtype, (), placement, world, progress)


def transformer_files(folder: Path, dtype: torch.dtype | None = torch.bfloat16) -> tuple[TransformerFiles, ...]:
    """What `quantize` and checks read: the folder's transformer, not loaded. CheckpointError as for loading."""
    from cogvideox_xdit.transformer import CogVideoXTransformer

    config = read_checkpoint(folder).transformer
    file = find_files(folder / "transformer", STEM, dtype)
    module = on_meta(CogVideoXTransformer, config)
    return (TransformerFiles(module, open_checkpoint(file), rename_table(config), file),)


def load_decoder(
    folder: Path, config: VAEConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> CogVideoXDecoder:
    """The decoder of a checkpoint's autoencoder."""
    from cogvideox_xdit.vae import CogVideoXDecoder

    return load(on_meta(CogVideoXDecoder, config), _vae(folder, "decoder.", dtype), None, device, dtype)  # type: ignore[return-value]


def load_encoder(
    folder: Path, config: VAEConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> CogVideoXEncoder:
    """The encoder of a checkpoint's autoencoder."""
    from cogvideox_xdit.vae import CogVideoXEncoder

    return load(on_meta(CogVideoXEncoder, config), _vae(folder, "encoder.", dtype), None, device, dtype)  # type: ignore[return-value]


def check_vae(folder: Path, config: VAEConfig, dtype: torch.dtype | None = None, encoder: bool = False) -> None:
    """Raise what `load_decoder` would raise for the headers, and `load_encoder` where that is needed too."""
    from cogvideox_xdit.vae import CogVideoXDecoder, CogVideoXEncoder

    check(on_meta(CogVideoXDecoder, config), _vae(folder, "decoder.", dtype))
    if encoder:
        check(on_meta(CogVideoXEncoder, config), _vae(folder, "encoder.", dtype))


def _vae(folder: Path, prefix: str, dtype: torch.dtype | None) -> Checkpoint:
    return open_checkpoint(find_files(folder / "vae", STEM, dtype)).select(prefix, strip=True)
