"""Train the small autoencoder in CogVideoX's layout on the synthetic world: both halves, from nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvideox_xdit.config import VAEConfig
from cogvideox_xdit.demo import TRAINED_VAE
from cogvideox_xdit.vae import CogVideoXDecoder, CogVideoXEncoder
from common.vae import CausalStream, LocalLink
from tools.demo.mochi_vae import clips
from tools.demo.training import Losses, Plan, in_bf16, train

FRAMES = 17
KL = 2e-4
"""Weight of a latent's divergence from the normal distribution against a pixel's squared error."""


class Autoencoder(nn.Module):
    """Chunk by chunk as the product runs it, since the norms' statistics are a chunk's."""

    def __init__(self, config: VAEConfig = TRAINED_VAE) -> None:
        super().__init__()
        self.encoder, self.decoder = CogVideoXEncoder(config), CogVideoXDecoder(config)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) in [-1, 1] -> mean and log variance (B, C, t, h, w)."""
        parts = video.split(self.encoder.chunks(video.shape[2]), 2)
        pairs = zip(parts, _streams(len(parts)), strict=True)
        mean, logvar = torch.cat([self.encoder(*pair) for pair in pairs], 2).chunk(2, dim=1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        parts = z.split(self.decoder.chunks(z.shape[2]), 2)
        return torch.cat([self.decoder(*pair) for pair in zip(parts, _streams(len(parts)), strict=True)], 2)

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encode(video)
        logvar = logvar.clamp(-12, 4)
        return self.decode(mean + (logvar / 2).exp() * noise), mean, logvar


def _streams(chunks: int) -> list[CausalStream]:
    """The place of each chunk of one video."""
    link = LocalLink()
    return [CausalStream(link, i == 0, i == chunks - 1) for i in range(chunks)]


def train_vae(folder: Path, steps: int = 1300, seed: int = 0) -> Autoencoder:
    """Train, or go on where it stopped; state and log lie in `folder`.

    Single frames first, which teach shapes and colours at a ninth of the cost, then clips of one chunk, then of two.
    """
    torch.manual_seed(seed)
    model = Autoencoder()

    def step(generator: torch.Generator, i: int) -> Losses:
        share = i / steps
        batch, frames = (24, 1) if share < 0.35 else (4, 9) if share < 0.9 else (3, FRAMES)
        x = clips(generator.initial_seed(), batch, max(frames, 9))[:, :, -frames:]
        shape = (batch, TRAINED_VAE.latent_channels, (frames - 1) // 4 + 1, 8, 8)
        noise = torch.randn(shape, generator=generator)
        out, mean, logvar = in_bf16(model, x.to(torch.bfloat16), noise.to(torch.bfloat16))
        mse = F.mse_loss(out.float(), x)
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        psnr = 10 * torch.log10(4 / mse.detach())
        return {"loss": mse + 0.1 * F.l1_loss(out.float(), x) + KL * kl, "mse": mse, "kl": kl, "psnr": psnr}

    plan = Plan(steps, 2e-3, warmup=100, average=0.995, seed=seed)
    model.load_state_dict(train(model, step, plan, folder / "cogvideox_vae.pt"))
    return model.eval()


def load_autoencoder(folder: Path) -> Autoencoder:
    """The trained autoencoder, frozen."""
    model = Autoencoder()
    model.load_state_dict(torch.load(folder / "cogvideox_vae.pt", weights_only=True)["average"])
    return model.eval().requires_grad_(False)
