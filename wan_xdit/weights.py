"""Weights in the original and in the diffusers layout, both ways: see `common.weights.load` for what a table means.

ComfyUI's files have the original names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from common.parallel.mesh import Axis
from common.parallel.usp import SequenceParallel
from common.run.quantize import TransformerFiles
from common.weights.load import (
    Checkpoint,
    Concat,
    Progress,
    Rename,
    check,
    find_files,
    load,
    on_meta,
    open_checkpoint,
)
from common.weights.placement import Placement, place
from common.weights.scaled import with_row_scales
from wan_xdit.checkpoint import CheckpointFiles, find_checkpoint
from wan_xdit.config import TransformerConfig, VAEConfig
from wan_xdit.layouts import PREFIX, STEM, weights_file

if TYPE_CHECKING:
    from wan_xdit.transformer import WanTransformer
    from wan_xdit.vae import WanDecoder, WanEncoder

_ORIGINAL_TOP = {
    "patch.proj": "patch_embedding",
    "text_in": "text_embedding.0",
    "text_out": "text_embedding.2",
    "time_in": "time_embedding.0",
    "time_out": "time_embedding.2",
    "time_proj": "time_projection.1",
    "modulation": "head.modulation",
    "head": "head.head",
}
_ORIGINAL_IMAGE = {
    "image.norm_in": "img_emb.proj.0",
    "image.proj_in": "img_emb.proj.1",
    "image.proj_out": "img_emb.proj.3",
    "image.norm_out": "img_emb.proj.4",
}
_ORIGINAL_BLOCK: dict[str, str | tuple[str, ...]] = {
    "modulation": "modulation",
    "attention.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "attention.q_norm": "self_attn.norm_q",
    "attention.k_norm": "self_attn.norm_k",
    "attention.out": "self_attn.o",
    "cross_norm": "norm3",
    "cross.q": "cross_attn.q",
    "cross.q_norm": "cross_attn.norm_q",
    "cross.kv": ("cross_attn.k", "cross_attn.v"),
    "cross.k_norm": "cross_attn.norm_k",
    "cross.out": "cross_attn.o",
    "ff_in": "ffn.0",
    "ff_out": "ffn.2",
}
_ORIGINAL_BLOCK_IMAGE: dict[str, str | tuple[str, ...]] = {
    "cross.image_kv": ("cross_attn.k_img", "cross_attn.v_img"),
    "cross.image_k_norm": "cross_attn.norm_k_img",
}
_DIFFUSERS_TOP = {
    "patch.proj": "patch_embedding",
    "text_in": "condition_embedder.text_embedder.linear_1",
    "text_out": "condition_embedder.text_embedder.linear_2",
    "time_in": "condition_embedder.time_embedder.linear_1",
    "time_out": "condition_embedder.time_embedder.linear_2",
    "time_proj": "condition_embedder.time_proj",
    "modulation": "scale_shift_table",
    "head": "proj_out",
}
_DIFFUSERS_IMAGE = {
    "image.norm_in": "condition_embedder.image_embedder.norm1",
    "image.proj_in": "condition_embedder.image_embedder.ff.net.0.proj",
    "image.proj_out": "condition_embedder.image_embedder.ff.net.2",
    "image.norm_out": "condition_embedder.image_embedder.norm2",
}
_DIFFUSERS_BLOCK: dict[str, str | tuple[str, ...]] = {
    "modulation": "scale_shift_table",
    "attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.q_norm": "attn1.norm_q",
    "attention.k_norm": "attn1.norm_k",
    "attention.out": "attn1.to_out.0",
    "cross_norm": "norm2",
    "cross.q": "attn2.to_q",
    "cross.q_norm": "attn2.norm_q",
    "cross.kv": ("attn2.to_k", "attn2.to_v"),
    "cross.k_norm": "attn2.norm_k",
    "cross.out": "attn2.to_out.0",
    "ff_in": "ffn.net.0.proj",
    "ff_out": "ffn.net.2",
}
_DIFFUSERS_BLOCK_IMAGE: dict[str, str | tuple[str, ...]] = {
    "cross.image_kv": ("attn2.add_k_proj", "attn2.add_v_proj"),
    "cross.image_k_norm": "attn2.norm_added_k",
}

LAYOUTS = ("original", "diffusers")


def fp32_names(config: TransformerConfig) -> tuple[str, ...]:
    """Parameters that the original computes with in fp32: time, modulation, the norm before the cross-attention."""
    blocks = (f"blocks.{i}.{name}" for i in range(config.layers) for name in ("modulation", *_of("cross_norm")))
    return (*_of("time_in"), *_of("time_out"), *_of("time_proj"), "modulation", *blocks)


def _of(module: str) -> tuple[str, str]:
    return f"{module}.weight", f"{module}.bias"


def rename_table(config: TransformerConfig, layout: str) -> Rename:
    """Our modules -> the names of a layout, `original` or `diffusers`. ComfyUI's files have the original names."""
    original = layout == "original"
    top = _ORIGINAL_TOP if original else _DIFFUSERS_TOP
    block = _ORIGINAL_BLOCK if original else _DIFFUSERS_BLOCK
    table: dict[str, str | Concat] = dict(top)  # type: ignore[arg-type]
    if config.image_width:
        table |= _ORIGINAL_IMAGE if original else _DIFFUSERS_IMAGE
        block = block | (_ORIGINAL_BLOCK_IMAGE if original else _DIFFUSERS_BLOCK_IMAGE)
    for i in range(config.layers):
        table |= behind(f"blocks.{i}", f"blocks.{i}", block)
    return table


def behind(ours: str, theirs: str, names: Mapping[str, str | tuple[str, ...]]) -> dict[str, str | Concat]:
    """Names of a module's parts -> of the same module among others; several of theirs are one of ours, side by side."""
    return {
        f"{ours}.{name}": f"{theirs}.{part}"
        if isinstance(part, str)
        else Concat(tuple(f"{theirs}.{one}" for one in part))
        for name, part in names.items()
    }


_VAE = {
    # Ours, the original's, diffusers'.
    "norm1": ("residual.0", "norm1"),
    "conv1": ("residual.2", "conv1"),
    "norm2": ("residual.3", "norm2"),
    "conv2": ("residual.6", "conv2"),
    "shortcut": ("shortcut", "conv_shortcut"),
}
_VAE_ENDS = {
    "conv_in": ("conv1", "conv_in"),
    "norm": ("head.0", "norm_out"),
    "conv_out": ("head.2", "conv_out"),
    "middle.attention.norm": ("middle.1.norm", "mid_block.attentions.0.norm"),
    "middle.attention.qkv": ("middle.1.to_qkv", "mid_block.attentions.0.to_qkv"),
    "middle.attention.out": ("middle.1.proj", "mid_block.attentions.0.proj"),
}
_VAE_MIDDLE = {"middle.first": ("middle.0", "mid_block.resnets.0"), "middle.last": ("middle.2", "mid_block.resnets.1")}


def decoder_table(config: VAEConfig, layout: str) -> Rename:
    """Our decoder's modules -> the names of a layout; its files hold the encoder as well."""
    return {"latents": "conv2" if layout == "original" else "post_quant_conv"} | _half("decoder", config, layout)


def encoder_table(config: VAEConfig, layout: str) -> Rename:
    """Our encoder's modules -> the names of a layout; its files hold the decoder as well."""
    return {"moments": "conv1" if layout == "original" else "quant_conv"} | _half("encoder", config, layout)


def _half(half: str, config: VAEConfig, layout: str) -> dict[str, str]:
    column = LAYOUTS.index(layout)
    table = {ours: f"{half}.{names[column]}" for ours, names in _VAE_ENDS.items()}
    blocks = {ours: f"{half}.{names[column]}" for ours, names in _VAE_MIDDLE.items()}
    depth = config.depth + (half == "decoder")
    places = _original_places if layout == "original" else _diffusers_places
    for stage in range(len(config.temporal) + 1):
        inside, resize = places(half, config, stage, depth)
        blocks |= {f"stages.{stage}.blocks.{k}": f"{half}.{name}" for k, name in enumerate(inside)}
        table[f"stages.{stage}.resize.space"] = f"{half}.{resize}.resample.1"
        table[f"stages.{stage}.resize.time"] = f"{half}.{resize}.time_conv"
    return table | {
        f"{ours}.{part}": f"{theirs}.{names[column]}" for ours, theirs in blocks.items() for part, names in _VAE.items()
    }


def _original_places(half: str, config: VAEConfig, stage: int, depth: int) -> tuple[list[str], str]:
    """A stage's residual blocks and its change of size. 2.1 counts both through; 2.2 has a list in each stage."""
    name = "upsamples" if half == "decoder" else "downsamples"
    start, prefix = (0, f"{name}.{stage}.{name}") if config.shortcuts else (stage * (depth + 1), name)
    return [f"{prefix}.{start + k}" for k in range(depth)], f"{prefix}.{start + depth}"


def _diffusers_places(half: str, config: VAEConfig, stage: int, depth: int) -> tuple[list[str], str]:
    if half == "encoder" and not config.shortcuts:
        return [
            f"down_blocks.{stage * (depth + 1) + k}" for k in range(depth)
        ], f"down_blocks.{stage * (depth + 1) + depth}"
    outer, resize = ("up_blocks", "upsampler") if half == "decoder" else ("down_blocks", "downsampler")
    resize = resize if config.shortcuts else f"{resize}s.0"
    return [f"{outer}.{stage}.resnets.{k}" for k in range(depth)], f"{outer}.{stage}.{resize}"


def load_transformer(
    files: CheckpointFiles,
    expert: int = 0,
    sp: SequenceParallel | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    placement: Placement | None = None,
    world: Axis | None = None,
    residual: torch.dtype | None = None,
) -> WanTransformer:
    """A checkpoint's transformer on `device`; of two experts, 0 is the one for high noise.

    residual: as for `WanTransformer`. See `common.weights.load.load` for memory and errors, and
    `common.weights.placement.place` for placement and world.
    """
    from wan_xdit.transformer import WanTransformer

    model = on_meta(WanTransformer, files.config, sp, residual)
    table, keep_fp32 = rename_table(files.config, files.layout), fp32_names(files.config)
    checkpoint = open_transformer(_file(files, files.experts[expert], dtype), table)
    return place(model, checkpoint, table, device, dtype, keep_fp32, placement, world, progress)


def open_transformer(file: Path, table: Rename) -> Checkpoint:
    """A transformer's tensors under the names of a table, be it in a file of ComfyUI's, which may be in eight bits."""
    from wan_xdit.transformer import WanTransformer

    checkpoint = open_checkpoint(file)
    if any(name.startswith(PREFIX) for name in checkpoint):
        checkpoint = checkpoint.select(PREFIX, strip=True)
    ends = tuple(f".{name}" for name in WanTransformer.matmuls)
    theirs = [source for ours, source in table.items() if ours.startswith("blocks.") and ours.endswith(ends)]
    kept_names: set[str] = set()
    for source in theirs:
        kept_names |= {f"{name}.weight" for name in (source.names if isinstance(source, Concat) else (str(source),))}
    return with_row_scales(checkpoint, kept_names.__contains__)


def _file(files: CheckpointFiles, place: Path, dtype: torch.dtype | None) -> Path:
    """The file, or the index of the shards, in which a part lies."""
    return weights_file(place) if files.layout == "original" else find_files(place, STEM, dtype)


def transformer_files(folder: Path, dtype: torch.dtype | None = torch.bfloat16) -> tuple[TransformerFiles, ...]:
    """What `quantize` and checks read: the folder's transformers, not loaded. CheckpointError as for loading."""
    from wan_xdit.transformer import WanTransformer

    files = find_checkpoint(folder)
    table, keep_fp32 = rename_table(files.config, files.layout), fp32_names(files.config)
    checkpoints = [_file(files, expert, dtype) for expert in files.experts]
    return tuple(
        TransformerFiles(on_meta(WanTransformer, files.config), open_transformer(file, table), table, file, keep_fp32)
        for file in checkpoints
    )


def expert_files(files: CheckpointFiles, expert: int, dtype: torch.dtype | None = None) -> tuple[Path, ...]:
    """The files that `load_transformer` reads."""
    checkpoint = open_checkpoint(_file(files, files.experts[expert], dtype))
    return tuple(dict.fromkeys(entry.file for entry in checkpoint.values()))


def load_decoder(
    files: CheckpointFiles, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> WanDecoder:
    """The decoder of a checkpoint's autoencoder."""
    from wan_xdit.vae import WanDecoder

    table, ignore = decoder_table(files.vae_config, files.layout), _OTHER_HALF["decoder"]
    return load(on_meta(WanDecoder, files.vae_config), _open_vae(files, dtype), table, device, dtype, ignore=ignore)


def load_encoder(
    files: CheckpointFiles, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> WanEncoder:
    """The encoder of a checkpoint's autoencoder."""
    from wan_xdit.vae import WanEncoder

    table, ignore = encoder_table(files.vae_config, files.layout), _OTHER_HALF["encoder"]
    return load(on_meta(WanEncoder, files.vae_config), _open_vae(files, dtype), table, device, dtype, ignore=ignore)


def check_vae(files: CheckpointFiles, dtype: torch.dtype | None = None, encoder: bool = False) -> None:
    """Raise what `load_decoder` would raise for the headers, and `load_encoder` where that is needed too."""
    from wan_xdit.vae import WanDecoder, WanEncoder

    checkpoint, config = _open_vae(files, dtype), files.vae_config
    halves: list[tuple[type[nn.Module], Rename, str]] = [
        (WanDecoder, decoder_table(config, files.layout), "decoder"),
        (WanEncoder, encoder_table(config, files.layout), "encoder"),
    ]
    for build, table, name in halves if encoder else halves[:1]:
        check(on_meta(build, config), checkpoint, table, _OTHER_HALF[name])


_OTHER_HALF = {
    "decoder": ("encoder.*", "conv1.*", "quant_conv.*"),
    "encoder": ("decoder.*", "conv2.*", "post_quant_conv.*"),
}
"""What a half's file holds beside it, in either layout."""


def _open_vae(files: CheckpointFiles, dtype: torch.dtype | None) -> Checkpoint:
    return with_row_scales(open_checkpoint(_file(files, files.vae, dtype)))
