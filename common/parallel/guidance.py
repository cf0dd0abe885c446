"""Classifier-free guidance over one axis of the mesh (Ho and Salimans 2022, arXiv 2207.12598).

conds = {b: model.prepare(text[b]) for b in guidance.branches(*scales)}
for t, scale in zip(times, scales):
    branches = guidance.branches(scale)
    predictions = sp.each(partial(model, z, t), [conds[b] for b in branches])
    z = step(z, guidance.combine(dict(zip(branches, predictions)), scale))
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common.parallel.exchange import exchange
from common.parallel.mesh import Axis

POSITIVE, NEGATIVE = 0, 1


class Guidance:
    """Branch 0 is the prompt, branch 1 the negative prompt. Two ranks on the axis take one branch each."""

    def __init__(self, axis: Axis | None = None) -> None:
        self.axis = axis or Axis()

    def branches(self, *scales: float) -> tuple[int, ...]:
        """The branches that this rank computes at these scales: on one rank a scale of 1 needs no negative one."""
        if self.axis.size > 1:
            return (self.axis.rank,)
        return (POSITIVE, NEGATIVE) if any(scale != 1 for scale in scales) else (POSITIVE,)

    def combine(self, predictions: Mapping[int, Tensor], scale: float) -> Tensor:
        """uncond + scale * (cond - uncond), in at least fp32.

        predictions: this rank's shard of the model's output for each of `branches(scale)`. Two ranks send each other
        theirs, once.
        """
        by_branch = {branch: _at_least_fp32(prediction) for branch, prediction in predictions.items()}
        if self.axis.size > 1:
            (own,) = by_branch.values()
            by_branch[1 - self.axis.rank] = self._swap(own)
        if scale == 1:
            return by_branch[POSITIVE]
        return by_branch[NEGATIVE] + scale * (by_branch[POSITIVE] - by_branch[NEGATIVE])

    def _swap(self, own: Tensor) -> Tensor:
        rows = own.numel()
        split = [0, rows] if self.axis.rank == 0 else [rows, 0]
        return exchange(own.reshape(-1), split, split, self.axis)().view_as(own)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
