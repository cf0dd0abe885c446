"""What `benchmarks/step.py` runs: reduced checkpoints, and forwards of ours and diffusers' on the same inputs.

The forks' own are in benchmarks/forks. Heads and blocks are fewer than the published ones; all else that decides the
time of a block is as published.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.parallel.usp import SequenceParallel
from common.run.demo import fill
from common.weights.load import save

Size = tuple[int, int, int]
STEM = "diffusion_pytorch_model"


class Model(Protocol):
    """One model. Its two guidance branches are 0 and 1."""

    def write(self, folder: Path) -> None:
        """A transformer folder in diffusers' layout with random weights in fp32."""

    def ours(self, folder: Path, sp: SequenceParallel, device: torch.device, dtype: torch.dtype) -> nn.Module: ...

    def theirs(self, folder: Path, dtype: torch.dtype) -> nn.Module: ...

    def case(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
        """Inputs of about so many video tokens."""


class Case(Protocol):
    """Inputs of one size."""

    latents: Tensor
    size: Size

    def pack(self, latents: Tensor) -> Tensor: ...

    def unpack(self, tokens: Tensor) -> Tensor: ...

    def prepare(self, model: nn.Module) -> list[Any]:
        """Both branches' conditions, once for a generation."""

    def forward(self, model: nn.Module, x: Tensor, cond: Any) -> Tensor:
        """Ours on packed tokens of this rank."""

    def their_step(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Diffusers' predictions for both branches on full latents, batched where its pipeline does so."""


def latent_size(tokens: int, ratio: float, patch: Size, divisor: int) -> Size:
    """Latent (T, H, W) of about so many tokens, W / H about `ratio`, the patches in W a multiple of `divisor`."""
    h = max(2, round(math.sqrt(tokens / 4 / ratio)))
    w = max(divisor, round(h * ratio / divisor) * divisor)
    return max(1, round(tokens / (h * w))) * patch[0], h * patch[1], w * patch[2]


@torch.no_grad()
def write(folder: Path, model: nn.Module, table: Any, numbers: dict[str, Any]) -> None:
    target = folder / "transformer"
    target.mkdir(parents=True)
    fill(model, 0)
    save(model.state_dict(), target / f"{STEM}.safetensors", table)
    (target / "config.json").write_text(json.dumps(numbers))
