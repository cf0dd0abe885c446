"""What one rank runs for one video, for `common.estimate`. The loop is CogVideoX's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogvideox_xdit.config import VAEConfig
from cogvideox_xdit.sampling import workload as cogvideox
from cogvideox_xdit.transformer import Condition, Size
from common.estimate import Workload
from common.parallel import Mesh
from consisid_xdit.config import ConsisIDConfig
from consisid_xdit.transformer import ConsisIDTransformer

PATCHES = 577
"""Tokens of each hidden state of the vision tower that read the face."""


def workload(
    config: ConsisIDConfig, vae: VAEConfig, mesh: Mesh, height: int, width: int, num_frames: int, **options: Any
) -> Workload:
    """As CogVideoX's, with a face. The models that read it from a photograph are not part of it."""

    def prepare(model: ConsisIDTransformer, text: Tensor, grid: Size, image: Tensor | None) -> Condition:
        face = None
        if config.face:
            known = torch.empty(1, config.id_dim, device="meta")
            hidden = [torch.empty(1, PATCHES, config.vit_dim, device="meta") for _ in range(config.scales)]
            face = model.read_face(known, hidden)
        return model.prepare(text, grid, image, face=face)

    return cogvideox(
        config, vae, mesh, height, width, num_frames, build=ConsisIDTransformer, prepare=prepare, **options
    )
