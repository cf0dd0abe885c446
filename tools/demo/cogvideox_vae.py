"""Train the small autoencoder in CogVideoX's layout on the synthetic world: both halves, from nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvideox_xdit.config import VAEConfig
from cogvideox_xdit.demo import TRAINED_VAE
from cogvideox_xdit.vae import CogVideoXDecoder, CogVideoXEncoder, SpatialNorm
from common.video.causal import CausalStream, LocalLink
from tools.demo.mochi_vae import clips
from tools.demo.training import Losses, Plan, in_bf16, train, write_atomically

FRAMES = 17
KL = 2e-4
"""Weight of a latent's divergence from the normal distribution against a pixel's squared error."""
LOGVAR = -8.0
"""Log variance of white latents."""
NOISE = 0.1
"""Spread of the noise that the decoder is trained against; white latents' is 1."""
SHAPE_WEIGHT = 8.0


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


@torch.no_grad()
def whiten(folder: Path, count: int = 250, seed: int = 0) -> None:
    """Turn and stretch the latents' axes so that over all positions they have mean 0 and covariance 1.

    Training leaves most of the variance in what the background is and a hundredth of it in outlines, which a
    diffusion model then learns last or never, since noise covers them until the last steps. The map is linear, so
    the encoder's last layer and whatever reads latents in the decoder take it up. Exact but at the picture's border,
    where the decoder's first layer sees zeros beyond; `train_decoder` comes after.
    """
    model = Autoencoder()
    model.load_state_dict(torch.load(folder / "cogvideox_vae.pt", weights_only=True)["average"])
    videos = clips(f"white {seed}", count, FRAMES)
    means = torch.cat([model.encode(x)[0] for x in videos.split(10)])
    write_atomically(folder / "cogvideox_white.pt", {"average": _whitened(model, means).state_dict()})


def _whitened(model: Autoencoder, latents: Tensor) -> Autoencoder:
    """`model` with axes in which `latents` (B, C, t, h, w), its own, are white."""
    flat = latents.movedim(1, -1).flatten(0, -2).double()
    centre, (variance, axes) = flat.mean(0), torch.linalg.eigh(torch.cov(flat.T))
    into, back = (axes * variance.rsqrt()).T, axes * variance.sqrt()
    last, channels = model.encoder.conv_out.conv, len(centre)
    weight, bias = last.weight.double(), last.bias.double()
    weight[:channels] = torch.einsum("ij,j...->i...", into, weight[:channels])
    bias[:channels] = into @ (bias[:channels] - centre)
    # A diagonal covariance does not stay one: what little the moments' noise was is given up.
    weight[channels:], bias[channels:] = 0, LOGVAR
    last.weight.copy_(weight)
    last.bias.copy_(bias)
    for part in model.decoder.modules():
        reading = (part.conv_in,) if isinstance(part, CogVideoXDecoder) else ()
        for conv in (part.conv_y, part.conv_b) if isinstance(part, SpatialNorm) else reading:
            weight = conv.conv.weight.double()
            conv.conv.bias += (weight.flatten(2).sum(2) @ centre).float()
            conv.conv.weight.copy_(torch.einsum("oi...,ij->oj...", weight, back))
    return model


def train_decoder(folder: Path, steps: int = 1500, batch: int = 4, seed: int = 0) -> None:
    """Go on with the decoder alone; latents, and with them a transformer that knows them, stay as they are.

    A small shape is a hundredth of the picture, so a plain mean learns its outline last: pixels near a shape count
    more. Latents get a little noise, since those of a transformer are not exact either.
    """
    model = load_autoencoder(folder)
    model.decoder.requires_grad_(True)

    def step(generator: torch.Generator, i: int) -> Losses:
        frames = 9 if i < 0.8 * steps else FRAMES
        x = clips(f"decoder {generator.initial_seed()}", batch, frames)
        with torch.no_grad():
            z = in_bf16(_Half(model, "encode"), x.to(torch.bfloat16))[0].float()
        z = z + NOISE * torch.randn(z.shape, generator=generator)
        out = in_bf16(_Half(model, "decode"), z.to(torch.bfloat16)).float()
        weight = 1 + SHAPE_WEIGHT * near_shape(x)
        error = (weight * ((out - x).square() + 0.1 * (out - x).abs())).sum() / weight.sum() / x.shape[1]
        mse = F.mse_loss(out.detach(), x)
        return {"loss": error, "mse": mse, "psnr": 10 * torch.log10(4 / mse)}

    plan = Plan(steps, 1e-3, warmup=50, average=0.99, seed=seed)
    train(model.decoder, step, plan, folder / "cogvideox_decoder.pt")


class _Half(nn.Module):
    """One half of an autoencoder as a module to call."""

    def __init__(self, model: Autoencoder, called: str) -> None:
        super().__init__()
        self.model, self.called = model, called

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return getattr(self.model, self.called)(x)


def near_shape(video: Tensor, reach: int = 2) -> Tensor:
    """(B, 1, T, H, W), 1 where a pixel within `reach` is not of the plain background (each clip's median), else 0."""
    plain = video.flatten(2).median(dim=2).values[..., None, None, None]
    shape = ((video - plain).abs().amax(1, keepdim=True) > 0.1).float()
    return F.max_pool3d(shape, (1, 2 * reach + 1, 2 * reach + 1), 1, (0, reach, reach))


def load_autoencoder(folder: Path) -> Autoencoder:
    """The trained autoencoder with white latents, frozen; its decoder as far as `train_decoder` came."""
    model = Autoencoder()
    model.load_state_dict(torch.load(folder / "cogvideox_white.pt", weights_only=True)["average"])
    if (folder / "cogvideox_decoder.pt").exists():
        model.decoder.load_state_dict(torch.load(folder / "cogvideox_decoder.pt", weights_only=True)["average"])
    return model.eval().requires_grad_(False)
