"""Weights in the original and in the diffusers layout, both ways: see `common.weights` for what a table means."""

from __future__ import annotations

from common.weights import Concat, Rename
from wan_xdit.config import TransformerConfig, VAEConfig

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


def exact_names(config: TransformerConfig) -> tuple[str, ...]:
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
        for ours, theirs in block.items():
            names = (theirs,) if isinstance(theirs, str) else theirs
            full = tuple(f"blocks.{i}.{name}" for name in names)
            table[f"blocks.{i}.{ours}"] = full[0] if isinstance(theirs, str) else Concat(full)
    return table


def vae_tables(config: VAEConfig) -> tuple[Rename, Rename]:
    """Our decoder's and encoder's modules -> the names of the original `.pth`, which holds both."""
    decoder: dict[str, str] = {"latents": "conv2"} | _vae_ends("decoder")
    encoder: dict[str, str] = {"moments": "conv1"} | _vae_ends("encoder")
    # 2.1 counts all blocks of a direction through; 2.2 has a list inside each stage.
    for table, name, depth in (
        (decoder, "decoder.upsamples", config.depth + 1),
        (encoder, "encoder.downsamples", config.depth),
    ):
        count, leaf = 0, name.split(".")[1]
        for stage in range(len(config.temporal) + 1):
            for block in range(depth + 1):
                where = f"{name}.{stage}.{leaf}.{block}" if config.shortcuts else f"{name}.{count}"
                if block < depth:
                    table |= _res_block(f"stages.{stage}.blocks.{block}", where)
                elif stage < len(config.temporal):
                    table |= {
                        f"stages.{stage}.resize.space": f"{where}.resample.1",
                        f"stages.{stage}.resize.time": f"{where}.time_conv",
                    }
                count += block < depth or stage < len(config.temporal)
    return decoder, encoder


def _vae_ends(half: str) -> dict[str, str]:
    table = {"conv_in": f"{half}.conv1", "norm": f"{half}.head.0", "conv_out": f"{half}.head.2"}
    table |= _res_block("middle.first", f"{half}.middle.0") | _res_block("middle.last", f"{half}.middle.2")
    attention = {"norm": "norm", "qkv": "to_qkv", "out": "proj"}
    return table | {f"middle.attention.{ours}": f"{half}.middle.1.{theirs}" for ours, theirs in attention.items()}


def _res_block(ours: str, theirs: str) -> dict[str, str]:
    parts = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    return {f"{ours}.{name}": f"{theirs}.{part}" for name, part in (parts | {"shortcut": "shortcut"}).items()}
