"""What each of six ranks computes of a decode, counted on real ranks: every row of a latent frame on one of them."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from cogvideox_xdit.config import VAEConfig
from cogvideox_xdit.vae import CogVideoXDecoder
from common.parallel.mesh import Layout, distributed
from common.registry.settings import DecodeOptions
from common.system.progress import Report
from common.video.causal import CausalStream
from common.video.decode import VideoDecoder
from common.video.decode_video import AllFrames, decode_video
from mochi_xdit.config import MochiVAEConfig
from mochi_xdit.vae import MochiDecoder

RANKS = 6


class Unpainted:
    """A real model's way of cutting a video, with black frames."""

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        assert stream is not None
        rows, columns = (n * self.spatial_factor for n in z.shape[3:])
        return z.new_zeros(1, 3, self.num_frames(z.shape[2], stream.first), rows, columns)


class Mochi(Unpainted, MochiDecoder):
    """12 channels of latents."""


class CogVideoX(Unpainted, CogVideoXDecoder):
    """16 channels of latents."""


def decoder(name: str) -> VideoDecoder:
    if name == "mochi":
        return Mochi(MochiVAEConfig(decoder_channels=(8,) * 4, layers=(1,) * 5, groups=4))
    return CogVideoX(VAEConfig(channels=(8,) * 4, layers=1, groups=4))


def counted(name: str, latents: int, rows: int) -> list[int]:
    """Rows of latent frames that this rank's decoder was given for one video, with plenty of memory, as if on GPUs."""
    mesh = replace(distributed(Layout(ulysses=RANKS)), device=torch.device("cuda"))
    model, given = decoder(name), []

    def note(_module, args) -> None:
        if args[0].device.type != "meta":  # a plan's memory is counted without data
            given.append(args[0].shape[2] * args[0].shape[3])

    model.register_forward_pre_hook(note)
    z = torch.randn(1, 12 if name == "mochi" else 16, latents, rows, 2)
    with mock.patch("common.video.decode_video.free_memory", lambda *_: 2**40):
        decode_video(model, z, mesh, DecodeOptions(), Report(), AllFrames())
    return given


@pytest.mark.parametrize(
    "name, latents, rows, most",
    [
        ("cogvideox", 13, 6, 13),
        ("mochi", 9, 12, 18),
        ("mochi", 9, 1, 2),
        ("mochi", 9, 4, 6),
        ("mochi", 28, 2, 10),
        ("mochi", 1, 5, 1),
    ],
    ids=[
        "CogVideoX, 49 frames",
        "Mochi, 49 frames",
        "one row: six groups",
        "four rows: three groups of two",
        "Mochi, 163 frames",
        "a picture",
    ],
)
@pytest.mark.slow
def test_nothing_is_decoded_twice(run_ranks, name, latents, rows, most):
    by_rank = [sum(given) for given in run_ranks(RANKS, counted, name, latents, rows)]
    assert sum(by_rank) == latents * rows and max(by_rank) == most
