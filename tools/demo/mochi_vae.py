"""Train the small autoencoder in Mochi's layout on the synthetic world."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mochi_xdit.config import MochiVAEConfig
from mochi_xdit.vae import MochiDecoder, MochiEncoder
from tools.demo.training import Losses, Plan, in_bf16, train
from tools.demo.world import draw, render

CONFIG = MochiVAEConfig(
    encoder_channels=(32, 32, 64, 64),
    decoder_channels=(32, 32, 64, 64),
    layers=(0, 1, 1, 1, 1),
    attention=(False, False, True, True, True),
    mean=(0.0,) * 12,
    std=(1.0,) * 12,
)
FRAMES = 13
KL = 1e-5


class Autoencoder(nn.Module):
    def __init__(self, config: MochiVAEConfig = CONFIG) -> None:
        super().__init__()
        self.encoder, self.decoder = MochiEncoder(config), MochiDecoder(config)


def clips(seed: int, count: int, frames: int = FRAMES, test: bool = False) -> Tensor:
    """(count, 3, frames, 64, 64) in [-1, 1]."""
    rng = random.Random(f"clips {seed} {test}")
    video = torch.stack([render(draw(rng, frames, test), frames) for _ in range(count)])
    return (video.float() / 127.5 - 1).movedim(-1, 1)


def train_vae(folder: Path, steps: int = 1500, batch: int = 8, seed: int = 0) -> Autoencoder:
    """Train, or go on where it stopped; state and log lie in `folder`."""
    torch.manual_seed(seed)
    model = Autoencoder()

    def step(generator: torch.Generator, i: int) -> Losses:
        # Short clips first: they cost half, and a causal network has little to learn from the later frames.
        x = clips(generator.initial_seed(), batch, 7 if i < 0.85 * steps else FRAMES)
        mean, logvar = in_bf16(model.encoder, x)
        mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        z = z.to(torch.bfloat16, memory_format=torch.channels_last_3d)
        out = in_bf16(model.decoder, z).float()
        mse = F.mse_loss(out, x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = mse + 0.2 * F.l1_loss(out, x) + KL * kl * 768
        psnr = 10 * torch.log10(4 / mse.detach())
        return {"loss": loss, "mse": mse, "kl": kl, "psnr": psnr, "spread": mean.detach().std()}

    train(model, step, Plan(steps, 2e-3, seed=seed), folder / "mochi_vae.pt")
    return model.eval()


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    train_vae(Path(sys.argv[1]), int(sys.argv[2]))
