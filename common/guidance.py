"""Classifier-free guidance over one axis of the mesh (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from common.parallel import Axis
from common.usp import exchange

POSITIVE, NEGATIVE = 0, 1


class Guidance:
    """Branch 0 is the prompt, branch 1 the negative prompt. Two ranks on the axis take one branch each."""

    def __init__(self, axis: Axis | None = None) -> None:
        self.axis = axis or Axis()

    @property
    def branches(self) -> tuple[int, ...]:
        """The branches this rank computes: prepare text for these and no others."""
        return (POSITIVE, NEGATIVE) if self.axis.size == 1 else (self.axis.rank,)

    def __call__(self, predict: Callable[[int], Tensor], scale: float) -> Tensor:
        """uncond + scale * (cond - uncond), in at least fp32.

        predict: maps a branch to this rank's shard of the model's output. On one rank a scale of 1
        needs no negative branch, and it is not computed. On two, each sends its shard to the other once.
        """
        if self.axis.size == 1:
            cond = _at_least_fp32(predict(POSITIVE))
            if scale == 1:
                return cond
            uncond = _at_least_fp32(predict(NEGATIVE))
        else:
            own = _at_least_fp32(predict(self.axis.rank))
            other = self._swap(own)
            cond, uncond = (own, other) if self.axis.rank == POSITIVE else (other, own)
            if scale == 1:
                return cond
        return uncond + scale * (cond - uncond)

    def _swap(self, own: Tensor) -> Tensor:
        rows = own.numel()
        split = [0, rows] if self.axis.rank == 0 else [rows, 0]
        return collectives.wait_tensor(exchange(own.reshape(-1), split, split, self.axis)).view_as(own)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
