"""What one rank runs for one video, for `common.memory.estimate`. The loop is CogVideoX's."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cogvideox_xdit import sampling
from cogvideox_xdit.transformer import Condition, Size
from consisid_xdit.config import read_consisid
from consisid_xdit.transformer import ConsisIDTransformer

PATCHES = 577
"""Tokens of each hidden state of the vision tower that read the face."""


def _prepare(model: ConsisIDTransformer, text: Tensor, grid: Size, image: Tensor | None) -> Condition:
    config, face = model.config, None
    if config.face:
        id_cond = torch.empty(1, config.id_dim, device="meta")
        hidden = [torch.empty(1, PATCHES, config.vit_dim, device="meta") for _ in range(config.scales)]
        face = model.read_face(id_cond, hidden)
    return model.prepare(text, grid, image, face=face)


workload = partial(sampling.workload, read=read_consisid, build=ConsisIDTransformer, prepare=_prepare)
"""As CogVideoX's, with a face. The models that read it from a photograph are not part of it."""
