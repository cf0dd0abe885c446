"""What each of six ranks computes of a decode, counted on real ranks: every latent frame once, on one of them."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from cogvideox_xdit.config import VAEConfig
from cogvideox_xdit.vae import CogVideoXDecoder
from common.parallel.mesh import Layout, distributed
from common.registry.settings import DecodeOptions
from common.system.progress import Report
from common.video.decode import VideoDecoder
from common.video.decode_video import decode_video
from mochi_xdit.config import MochiVAEConfig
from mochi_xdit.vae import MochiDecoder

RANKS = 6


def decoder(name: str) -> VideoDecoder:
    """With the real model's way of cutting a video, but few channels."""
    torch.manual_seed(0)
    if name == "mochi":
        widths = (8, 8, 8, 8)
        return MochiDecoder(MochiVAEConfig(decoder_channels=widths, layers=(1, 1, 1, 1, 1), groups=4)).eval()
    return CogVideoXDecoder(VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4)).eval()


def counted(name: str, latents: int) -> list[int]:
    """Latent frames that this rank's decoder was given for one video, with plenty of memory, as if on GPUs."""
    mesh = replace(distributed(Layout(ulysses=RANKS)), device=torch.device("cuda"))
    model, given = decoder(name), []

    def note(_module, args) -> None:
        if args[0].device.type != "meta":  # a plan's memory is counted without data
            given.append(args[0].shape[2])

    model.register_forward_pre_hook(note)
    z = torch.randn(1, 12 if name == "mochi" else 16, latents, 2, 2)
    with mock.patch("common.video.decode_video.free_memory", lambda *_: 2**40):
        decode_video(model, z, mesh, DecodeOptions(), Report())
    return given


@pytest.mark.parametrize(
    "name, latents, most",
    [("cogvideox", 13, 3), ("mochi", 9, 2), ("mochi", 28, 6)],
    ids=["CogVideoX, 49 frames", "Mochi, 49 frames", "Mochi, 163 frames"],
)
@pytest.mark.slow
def test_no_frame_is_decoded_twice(run_ranks, name, latents, most):
    by_rank = [sum(frames) for frames in run_ranks(RANKS, counted, name, latents)]
    assert sum(by_rank) == latents and max(by_rank) == most
