"""Train the small autoencoder in Wan 2.2's layout on the synthetic world: both halves, from nothing.

The decoder is trained on latents brought to mean 0 and spread 1, with noise, so that no axis of them is worth more than
another one and a transformer's small errors are forgiven. `whiten` then turns the axes until the latents are white.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.demo.cogvideox_vae import LOGVAR, SHAPE_WEIGHT, near_shape
from tools.demo.mochi_vae import FRAMES, clips
from tools.demo.training import Losses, Plan, in_bf16, train, write_atomically
from tools.demo.wan_quick import quicken
from wan_xdit.config import VAEConfig
from wan_xdit.demo import TRAINED_VAE
from wan_xdit.vae import WanDecoder, WanEncoder

NOISE = 0.1
"""Spread of the noise that the decoder is trained against; the latents' is 1."""
LATENT_AXES = (0, 2, 3, 4)
"""All but the channels."""


class Autoencoder(nn.Module):
    """Both halves over whole clips: chunks would give the same."""

    def __init__(self, config: VAEConfig = TRAINED_VAE) -> None:
        super().__init__()
        self.encoder, self.decoder = WanEncoder(config), WanDecoder(config)

    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> the latents' means (B, C, t, h, w)."""
        return self.encoder(video).chunk(2, dim=1)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, video: Tensor, generator: torch.Generator) -> Tensor:
        z = self.encode(video).float()
        std, mean = torch.std_mean(z, LATENT_AXES, keepdim=True)
        z = (z - mean) / (std + 1e-3)
        z = z + NOISE * torch.randn(z.shape, generator=generator)
        return self.decode(z.to(video.dtype))


def reconstruction_losses(out: Tensor, video: Tensor) -> Losses:
    """A small shape is a hundredth of the picture, so pixels near it count more."""
    weight = 1 + SHAPE_WEIGHT * near_shape(video)
    error = (weight * ((out - video).square() + 0.1 * (out - video).abs())).sum() / weight.sum() / video.shape[1]
    mse = F.mse_loss(out.detach(), video)
    return {"loss": error, "mse": mse, "psnr": 10 * torch.log10(4 / mse)}


def train_vae(folder: Path, steps: int = 1000, seed: int = 0) -> None:
    """Train, or go on where it stopped; state and log lie in `folder`.

    Single frames first, which teach shapes and colours at a fraction of the cost, then clips of three latents, which
    have all that a longer one has, then whole clips.
    """
    torch.manual_seed(seed)
    model = Autoencoder()
    quicken(model)

    def step(generator: torch.Generator, i: int) -> Losses:
        share = i / steps
        batch, frames = (32, 1) if share < 0.3 else (8, 9) if share < 0.85 else (6, FRAMES)
        x = clips(f"wan {generator.initial_seed()}", batch, max(frames, 9))[:, :, -frames:]
        video = x.to(torch.bfloat16, memory_format=torch.channels_last_3d)
        out = in_bf16(model, video, generator)
        return reconstruction_losses(out.float(), x)

    plan = Plan(steps, 2e-3, warmup=100, average=0.995, seed=seed)
    train(model, step, plan, folder / "wan_vae.pt")


@torch.no_grad()
def whiten(folder: Path, count: int = 250, seed: int = 0) -> None:
    """Turn and stretch the latents' axes so that over all positions they have mean 0 and covariance 1.

    Training leaves some axes with much of what the others say, and noise then hides outlines until the last steps of a
    generation. The map is linear and both halves have a convolution of one place next to the latents, which take it up
    exactly. A diagonal variance does not stay one, so the moments' noise, which nothing here uses, becomes a constant.
    """
    model = Autoencoder()
    model.load_state_dict(torch.load(folder / "wan_vae.pt", weights_only=True)["average"])
    latents = torch.cat([model.encode(x) for x in clips(f"white {seed}", count).split(10)])
    flat = latents.movedim(1, -1).flatten(0, -2).double()
    centre, spread = flat.mean(0), flat.std(0)
    variance, axes = torch.linalg.eigh(torch.cov(flat.T))
    into, back = (axes * variance.rsqrt()).T, axes * variance.sqrt()
    channels = len(centre)

    last = model.encoder.moments
    weight, bias = last.weight.flatten(1).double(), last.bias.double()
    weight[:channels], bias[:channels] = into @ weight[:channels], into @ (bias[:channels] - centre)
    weight[channels:], bias[channels:] = 0, LOGVAR
    last.weight.copy_(weight.view_as(last.weight))
    last.bias.copy_(bias)

    first = model.decoder.latents  # has seen latents of mean 0 and spread 1
    weight = first.weight.flatten(1).double()
    first.weight.copy_((weight @ (back / spread[:, None])).view_as(first.weight))
    write_atomically(folder / "wan_white.pt", {"average": model.state_dict()})


def train_decoder(folder: Path, steps: int = 1500, batch: int = 6, seed: int = 0) -> None:
    """Go on with the decoder alone; latents, and with them a transformer that knows them, stay as they are."""
    model = load_autoencoder(folder)
    model.decoder.requires_grad_(True)
    quicken(model)

    def step(generator: torch.Generator, _: int) -> Losses:
        x = clips(f"decoder {generator.initial_seed()}", batch, FRAMES)
        with torch.no_grad():
            z = (
                in_bf16(model.encoder, x.to(torch.bfloat16, memory_format=torch.channels_last_3d))
                .chunk(2, dim=1)[0]
                .float()
            )
        z = z + NOISE * torch.randn(z.shape, generator=generator)
        return reconstruction_losses(
            in_bf16(model.decoder, z.to(torch.bfloat16, memory_format=torch.channels_last_3d)).float(), x
        )

    plan = Plan(steps, 1e-3, warmup=50, average=0.99, seed=seed)
    train(model.decoder, step, plan, folder / "wan_decoder.pt")


def load_autoencoder(folder: Path) -> Autoencoder:
    """The trained autoencoder with white latents, frozen; its decoder as far as `train_decoder` came."""
    model = Autoencoder()
    model.load_state_dict(torch.load(folder / "wan_white.pt", weights_only=True)["average"])
    if (folder / "wan_decoder.pt").exists():
        model.decoder.load_state_dict(torch.load(folder / "wan_decoder.pt", weights_only=True)["average"])
    return model.eval().requires_grad_(False)
