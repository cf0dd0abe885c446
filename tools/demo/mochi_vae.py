"""Train the small autoencoder in Mochi's layout on the synthetic world."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.video.causal import CausalStream
from mochi_xdit.config import MochiVAEConfig
from mochi_xdit.demo import VAE
from mochi_xdit.vae import MochiDecoder, MochiEncoder, fourier_features
from tools.demo.mochi_linear import start_linear
from tools.demo.training import Losses, Plan, in_bf16, train, write_atomically
from tools.demo.world import draw, render

CONFIG = dataclasses.replace(VAE, mean=(0.0,) * 12, std=(1.0,) * 12)
FRAMES = 13
NOISE = 0.1
"""Added to the latents in training, so that the decoder forgives what the transformer gets slightly wrong."""


class Autoencoder(nn.Module):
    def __init__(self, config: MochiVAEConfig = CONFIG) -> None:
        super().__init__()
        self.encoder, self.decoder = MochiEncoder(config), MochiDecoder(config)


def clips(seed: int | str, count: int, frames: int = FRAMES, test: bool = False) -> Tensor:
    """(count, 3, frames, 64, 64) in [-1, 1]."""
    rng = random.Random(f"clips {seed} {test}")
    video = torch.stack([render(draw(rng, frames, test), frames) for _ in range(count)])
    return (video.float() / 127.5 - 1).movedim(-1, 1)


def load_autoencoder(folder: Path, seed: int = 0) -> Autoencoder:
    """The autoencoder as far as it was trained; the encoder is that of `start_linear` and stays so.

    A fixed encoder lets the transformer learn while the decoder still does.
    """
    file = folder / "mochi_encoder.pt"
    torch.manual_seed(seed)
    model = Autoencoder()
    if not file.exists():
        start_linear(model, clips("components", 400))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, model.state_dict())
    model.load_state_dict(torch.load(file, weights_only=True))
    model.encoder.requires_grad_(False)
    return model


def encode(encoder: MochiEncoder, video: Tensor) -> Tensor:
    """The encoder's mean without its residual branches, which `start_linear` made zero: the same, much cheaper."""
    stream = CausalStream()
    proj_in, *blocks = encoder.layers
    x = proj_in(fourier_features(video, (6, 7)).movedim(1, -1)).movedim(-1, 1)
    for block in blocks[:3]:
        x = block.layers[0](x, stream)
    moments = encoder.output_proj(F.silu(encoder.output_norm(x)).movedim(1, -1)).movedim(-1, 1)
    return moments.chunk(2, dim=1)[0]


def train_vae(folder: Path, steps: int = 600, batch: int = 6, seed: int = 0) -> Autoencoder:
    """Train the decoder, or go on where it stopped; state and log lie in `folder`."""
    model = load_autoencoder(folder, seed)

    def step(generator: torch.Generator, i: int) -> Losses:
        x = clips(generator.initial_seed(), batch, 7 if i < 0.8 * steps else FRAMES)
        with torch.no_grad():
            z = encode(model.encoder, x)
        z = z + NOISE * torch.randn(z.shape, generator=generator)
        z = z.to(torch.bfloat16, memory_format=torch.channels_last_3d)
        out = in_bf16(model.decoder, z).float()
        mse = F.mse_loss(out, x)
        psnr = 10 * torch.log10(4 / mse.detach())
        return {"loss": mse + 0.1 * F.l1_loss(out, x), "mse": mse, "psnr": psnr}

    weights = train(model.decoder, step, Plan(steps, 3e-4, warmup=50, average=0.99, seed=seed), folder / "mochi_vae.pt")
    model.decoder.load_state_dict(weights)
    return model.eval()
