"""Small random Wan checkpoints of the published kinds, in the diffusers layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from wan_xdit.config import TransformerConfig
from wan_xdit.demo import demo_config, demo_vae, random_checkpoint

KINDS = ("t2v-1.3b", "i2v-14b-480p", "t2v-a14b", "i2v-a14b", "ti2v-5b")


def small(kind: str) -> TransformerConfig:
    """Two blocks of three heads, which two ranks share unevenly."""
    small = replace(demo_config(kind), width=48, heads=3, ffn=72, text_dim=32, text_length=24)
    # Before the image's tokens the reference takes 512 of the text for granted.
    return replace(small, text_length=512) if small.image_width else small


def write_checkpoint(folder: Path, kind: str) -> Path:
    """A whole small checkpoint of a kind in fp32 (the text encoder in bf16), with latents that are not white."""
    vae = demo_vae(kind)
    channels = range(vae.latent_channels)
    stats = {"mean": tuple(0.1 * c - 0.2 for c in channels), "std": tuple(0.8 + 0.1 * c for c in channels)}
    random_checkpoint(folder, kind, small(kind), replace(vae, **stats), torch.float32)
    return folder
