"""From latents to frames, and from sound tokens to samples."""

from __future__ import annotations

from torch import Tensor, nn

from common.video.causal import CausalConv3d, CausalStream
from common.video.decode import VideoDecoder
from toy_xdit.config import FPS, LATENTS, RATE, Config


class ToyDecoder(VideoDecoder):
    spatial_factor = LATENTS.pixels
    chunk_choices = (4, 2, 1)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.conv = CausalConv3d(config.channels, 3 * self.spatial_factor**2, (3, 1, 1))

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        x = self.conv(z, stream or CausalStream())  # (1, 3 * 8 * 8, t, h, w)
        x = x.unflatten(1, (3, self.spatial_factor, self.spatial_factor)).permute(0, 1, 4, 5, 2, 6, 3)
        return x.flatten(5, 6).flatten(3, 4).tanh()


class SoundDecoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.samples = nn.Linear(config.sound_channels, RATE // FPS // 5)

    def forward(self, sound: Tensor) -> Tensor:
        """(1, m, C) to samples (1, n) in [-1, 1]."""
        return self.samples(sound).flatten(1).tanh()
