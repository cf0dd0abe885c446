"""Train the small autoencoder in Mochi's layout on the synthetic world."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mochi_xdit.config import MochiVAEConfig
from mochi_xdit.demo import VAE
from mochi_xdit.vae import MochiDecoder, MochiEncoder
from tools.demo.training import Losses, Plan, in_bf16, train
from tools.demo.world import draw, render

CONFIG = dataclasses.replace(VAE, mean=(0.0,) * 12, std=(1.0,) * 12)
FRAMES = 13
KL = 1e-6
OFFSET = 2.0


class Autoencoder(nn.Module):
    def __init__(self, config: MochiVAEConfig = CONFIG) -> None:
        super().__init__()
        self.encoder, self.decoder = MochiEncoder(config), MochiDecoder(config)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Let norms see levels, and the latents start with little noise.

        With few channels in a group, normalising each frame removes what a plain scene consists of: its brightness and
        contrast. Constant channels of opposite sign within each group dominate its statistics, and the norm becomes
        almost linear in the others.
        """
        down = [layer.layers[0] for layer in self.encoder.layers if hasattr(layer, "layers")]
        up = [block.proj for block in self.decoder.blocks if hasattr(block, "proj")]
        for layer in (*down, self.decoder.blocks[0][0], *up[:-1]):
            channels = torch.arange(len(layer.bias))
            if layer in up:
                block = next(b for b in self.decoder.blocks if getattr(b, "proj", None) is layer)
                channels //= block.time * block.space**2
            layer.bias.copy_(OFFSET * torch.tensor([1.0, -1.0, 0.0])[channels % 3])
        latent = self.encoder.config.latent_channels
        # silu of a normed channel is 0.2 on average: this makes the log variance about -5.
        self.encoder.output_proj.weight[latent:] = -5 / (0.2 * self.encoder.output_proj.in_features)


def clips(seed: int, count: int, frames: int = FRAMES, test: bool = False) -> Tensor:
    """(count, 3, frames, 64, 64) in [-1, 1]."""
    rng = random.Random(f"clips {seed} {test}")
    video = torch.stack([render(draw(rng, frames, test), frames) for _ in range(count)])
    return (video.float() / 127.5 - 1).movedim(-1, 1)


def train_vae(folder: Path, steps: int = 1500, batch: int = 6, seed: int = 0) -> Autoencoder:
    """Train, or go on where it stopped; state and log lie in `folder`."""
    torch.manual_seed(seed)
    model = Autoencoder()

    def step(generator: torch.Generator, i: int) -> Losses:
        x = clips(generator.initial_seed(), batch, 7 if i < 0.9 * steps else FRAMES)
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
