"""Every fork's decoder and encoder with few channels, which any worker can build alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import cogvideox_xdit.vae
import wan_xdit.vae
from cogvideox_xdit.config import VAEConfig
from cogvideox_xdit.vae import CogVideoXDecoder, CogVideoXEncoder
from common.video.causal import CausalStream, LocalLink, spans
from common.video.decode import VideoDecoder
from mochi_xdit.config import MochiVAEConfig
from mochi_xdit.vae import MochiDecoder
from wan_xdit.config import VAEConfig as WanVAEConfig
from wan_xdit.vae import WanDecoder, WanEncoder

T = TypeVar("T", bound=nn.Module)

MOCHI = MochiVAEConfig(decoder_channels=(4, 8, 8, 12), layers=(1,) * 5, groups=4)
WAN = WanVAEConfig(
    width=4, decoder_width=4, latent_channels=4, multiples=(1, 2, 2, 2), depth=1, mean=(0.1,) * 4, std=(0.9,) * 4
)
WAN_LATER = WanVAEConfig(**(WAN.__dict__ | {"fold": 2, "shortcuts": True}))

COGVIDEOX = VAEConfig(channels=(8, 8, 8, 12), layers=1, groups=4)

DECODERS = {
    "mochi": (lambda: MochiDecoder(MOCHI), 12),
    "cogvideox": (lambda: CogVideoXDecoder(COGVIDEOX), 16),
    "wan 2.1": (lambda: WanDecoder(WAN), 4),
    "wan 2.2": (lambda: WanDecoder(WAN_LATER), 4),
}

ENCODERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], int]] = {
    "cogvideox": (lambda: CogVideoXEncoder(COGVIDEOX), cogvideox_xdit.vae.encode, COGVIDEOX.space_compression),
    "wan 2.1": (lambda: WanEncoder(WAN), wan_xdit.vae.encode, WAN.space),
    "wan 2.2": (lambda: WanEncoder(WAN_LATER), wan_xdit.vae.encode, WAN_LATER.space),
}


def small_decoder(name: str, dtype: torch.dtype = torch.float64) -> VideoDecoder:
    """Of these weights."""
    return _nudged(DECODERS[name][0]).to(dtype).eval()


def small_encoder(name: str) -> nn.Module:
    """Of these weights, fp64."""
    return _nudged(ENCODERS[name][0]).double().eval()


def _nudged(make: Callable[[], T]) -> T:
    """No weight is one that a fresh layer begins with: norms scale and shift."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def some_latents(name: str, frames: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(1, C, T, h, w) of the transformer's space."""
    generator = torch.Generator().manual_seed(frames)
    shape = (1, DECODERS[name][1], frames, height, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def decoded_alone(model: VideoDecoder, latents: Tensor, chunk: int) -> Tensor:
    """All pixels (1, 3, T, H, W) by one process, chunk by chunk of the whole picture."""
    link, z = LocalLink(), model.denormalize(latents)
    parts = spans(model.chunks(z.shape[2], chunk))
    last = len(parts) - 1
    return torch.cat([model(z[:, :, p], CausalStream(link, k == 0, k == last)) for k, p in enumerate(parts)], 2)
