"""What one rank runs for one video, for `common.memory.estimate`. The loop is CogVideoX's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cogvideox_xdit.config import VAEConfig
from cogvideox_xdit.sampling import work_of
from cogvideox_xdit.transformer import Condition
from cogvideox_xdit.transformer import Size as Grid
from common.memory.estimate import Workload
from common.parallel.mesh import Mesh
from common.registry.forks import Model, Size
from consisid_xdit.config import ConsisIDConfig, read_consisid
from consisid_xdit.transformer import ConsisIDTransformer

PATCHES = 577
"""Tokens of each hidden state of the vision tower that read the face."""


def workload(
    source: Path | Model,
    size: Size,
    mesh: Mesh,
    dtype: torch.dtype = torch.bfloat16,
    negative: bool = False,
    text_encoder_dir: str | Path | None = None,
) -> Workload:
    """As CogVideoX's, with a face. The models that read it from a photograph are not part of it."""
    if isinstance(source, Path):
        checkpoint = read_consisid(source)
        config, vae = checkpoint.transformer, checkpoint.vae
    else:
        config, vae = source.config, VAEConfig()
    assert isinstance(config, ConsisIDConfig)

    def prepare(model: ConsisIDTransformer, text: Tensor, grid: Grid, image: Tensor | None) -> Condition:
        face = None
        if config.face:
            known = torch.empty(1, config.id_dim, device="meta")
            hidden = [torch.empty(1, PATCHES, config.vit_dim, device="meta") for _ in range(config.scales)]
            face = model.read_face(known, hidden)
        return model.prepare(text, grid, image, face=face)

    work = work_of(config, vae, size, mesh, dtype, ConsisIDTransformer, prepare)
    return work.with_text(lambda: Path(text_encoder_dir or source)) if isinstance(source, Path) else work
