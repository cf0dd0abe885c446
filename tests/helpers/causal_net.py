"""A small causal network that is no model: a decoder for tests of streams, their links over ranks, tiles and plans."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from common.video.causal import CausalConv3d, CausalStream, spans
from common.video.decode import VideoDecoder


class Net(VideoDecoder):
    """Causal convolutions that double rows and columns and keep the number of frames."""

    spatial_factor = 2
    chunk_choices = (3, 2, 1)

    def __init__(self, layers: int = 4, kernel: int = 3, mode: str = "replicate", channels: int = 3) -> None:
        super().__init__()
        sizes = [2] + [channels] * (layers - 1) + [3]
        self.layers = nn.ModuleList(CausalConv3d(a, b, (kernel, 3, 3), mode) for a, b in pairwise(sizes))

    def chunks(self, latents: int, chunk: int) -> list[int]:
        whole, rest = divmod(latents, chunk)
        return [chunk] * whole + [rest] * (rest > 0)

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        stream = stream or CausalStream()
        x = z.repeat_interleave(2, 3).repeat_interleave(2, 4)
        for layer in self.layers:
            x = torch.tanh(layer(x, stream))
        return x


def net(dtype: torch.dtype = torch.float64, **numbers) -> Net:
    torch.manual_seed(0)
    return Net(**numbers).to(dtype)


def latents(frames: int, height: int = 3, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(1, 2, frames, height, width, generator=generator, dtype=torch.float64)


def stream_through(model: nn.Module, z: Tensor, lengths: list[int], link) -> Tensor:
    parts = spans(lengths)
    last = len(parts) - 1
    return torch.cat([model(z[:, :, p], CausalStream(link, k == 0, k == last)) for k, p in enumerate(parts)], 2)
