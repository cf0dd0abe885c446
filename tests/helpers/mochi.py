"""A tiny Mochi checkpoint in either official layout, with everything a pipeline needs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from common.run.demo import fill, write_text_encoder
from common.weights.load import save
from mochi_xdit.config import MochiConfig, MochiVAEConfig
from mochi_xdit.transformer import MochiTransformer, pack, unpack
from mochi_xdit.vae import MochiDecoder, MochiEncoder
from mochi_xdit.weights import decoder_rename, encoder_rename, transformer_rename

CAPTIONS = [f"a {c} {s} moves to the {d}" for c in ("red", "blue") for s in ("ball", "box") for d in ("left", "right")]
VAE = MochiVAEConfig(
    encoder_channels=(32, 32, 32, 32), decoder_channels=(32, 32, 32, 32), layers=(1, 1, 1, 1, 1), head_dim=16
)
# Five heads: no ulysses degree but 1 and 5 divides them.
TINY = MochiConfig(
    depth=3, heads=5, head_dim=16, hidden_y=48, mlp_x=213, mlp_y=128, text_dim=32, text_heads=8, text_tokens=64, vae=VAE
)


def build(seed: int = 0) -> tuple[MochiTransformer, MochiDecoder, MochiEncoder]:
    modules = MochiTransformer(TINY), MochiDecoder(VAE), MochiEncoder(VAE)
    for i, module in enumerate(modules):
        fill(module, seed + i)
    # Rotary angles of the size they have in the official checkpoint, where positions reach a hundred.
    torch.nn.init.normal_(modules[0].pos_frequencies, std=0.1, generator=torch.Generator().manual_seed(seed))
    return modules


@torch.no_grad()
def denoise(
    model: MochiTransformer, latents: Tensor, t: Tensor, text: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """`prepare` and one `forward` on full latents (B, C, T, H, W), for all ranks' tokens; the same on every rank."""
    size = (latents.shape[2], latents.shape[3], latents.shape[4])
    tokens = pack(latents, model.config.patch)
    cond = model.prepare(size, text, mask, batch=latents.shape[0])
    out = model(model.sp.shard(tokens).to(model.device), t, cond)
    return unpack(model.sp.gather(out, model.sp.lengths(tokens.shape[1])), size, model.config.patch)


def write_checkpoint(folder: Path, layout: str = "native") -> Path:
    """fp32 weights in the `native` or `diffusers` layout, with a T5 encoder beside them."""
    transformer, decoder, encoder = build()
    write_text_encoder(
        folder, CAPTIONS, seed=3, limit=TINY.text_tokens, d_model=32, layers=2, heads=2, d_kv=16, d_ff=128
    )
    if layout == "native":
        save(transformer.state_dict(), folder / "dit.safetensors")
        save(decoder.state_dict(), folder / "decoder.safetensors")
        save(encoder.state_dict(), folder / "encoder.safetensors")
        return folder
    stem = "diffusion_pytorch_model.safetensors"
    for part in ("transformer", "vae", "scheduler"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    save(transformer.state_dict(), folder / "transformer" / stem, rename=transformer_rename(TINY), shard_bytes=400_000)
    _write(folder / "transformer" / "config.json", transformer_json())
    parts = {"decoder": (decoder, decoder_rename(VAE)), "encoder": (encoder, encoder_rename(VAE))}
    state = {f"{part}.{name}": t for part, (module, _) in parts.items() for name, t in module.state_dict().items()}
    table = {f"{part}.{name}": theirs for part, (_, names) in parts.items() for name, theirs in names.items()}
    save(state, folder / "vae" / stem, rename=table)
    _write(folder / "vae" / "config.json", vae_json())
    return folder


def transformer_json() -> dict:
    return {
        "_class_name": "MochiTransformer3DModel",
        "num_layers": TINY.depth,
        "num_attention_heads": TINY.heads,
        "attention_head_dim": TINY.head_dim,
        "pooled_projection_dim": TINY.hidden_y,
        "in_channels": TINY.channels,
        "patch_size": TINY.patch,
        "text_embed_dim": TINY.text_dim,
        "time_embed_dim": TINY.time_dim,
        "max_sequence_length": TINY.text_tokens,
        "qk_norm": "rms_norm",
        "activation_fn": "swiglu",
    }


def vae_json() -> dict:
    return {
        "_class_name": "AutoencoderKLMochi",
        "encoder_block_out_channels": list(VAE.encoder_channels),
        "decoder_block_out_channels": list(VAE.decoder_channels),
        "layers_per_block": list(VAE.layers),
    }


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values))
