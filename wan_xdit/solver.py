"""The schedules and solvers of flow matching: UniPC, DPM++ and Euler, for tensors of any shape.

Everything is elementwise, so each rank steps its own tokens. Noise levels and times are those of diffusers'
schedulers with flow sigmas, rounded as there; coefficients are numbers of the host, so that nothing waits for a
device. A sample at noise level s is (1 - s) video + s noise, and the model predicts noise - video.

UniPC: Zhao et al. 2023 (arXiv 2302.04867), B(h) = expm1(-h), order 2. DPM-Solver++ (2M): Lu et al. 2022 (arXiv
2211.01095). Both in l = log((1 - s) / s), with h = l_next - l.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from wan_xdit.checkpoint import SOLVERS

TRAINED_STEPS = 1000
"""Times are this times the noise level."""
_FIRST_BELOW_ONE = 1e-6
"""UniPC's first level stays so far below 1, where l is minus infinity."""
PREDICTED = ("video1", "video0", "before")
"""Names in the solvers' memories of videos that were predicted, the latest first; Euler remembers none."""


def shifted(sigma: float, shift: float) -> float:
    """A noise level moved up: shift s / (1 + (shift - 1) s)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


class Solver:
    """One generation's steps from noise to latents: `timesteps`, and `step` for each in order.

    shift: how far the noise levels are moved up. Raises ValueError for too few or too many steps.
    """

    def __init__(self, steps: int, shift: float) -> None:
        if not 1 <= steps <= TRAINED_STEPS:
            raise ValueError(f"the number of steps is {steps}; it must be 1 to {TRAINED_STEPS}")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift is {shift}; it must be above 0")
        levels = self.schedule(steps, shift)
        self.timesteps: list[float] = [self.time(level) for level in levels]
        self.sigmas: list[float] = [float(np.float32(level)) for level in levels] + [0.0]

    def __len__(self) -> int:
        return len(self.timesteps)

    def schedule(self, steps: int, shift: float) -> list[float]:
        """Noise levels before each step."""
        raise NotImplementedError

    def time(self, sigma: float) -> float:
        """The time that the model is told at a level: whole, as the authors' solvers round it down."""
        return float(int(sigma * TRAINED_STEPS))

    @property
    def memory(self) -> dict[str, Tensor]:
        """What is remembered of the steps before, by name; each like the latents."""
        return {}

    def recall(self, i: int, memory: Mapping[str, Tensor]) -> None:
        """Go on at step i from where `memory` was taken; names of others are passed over."""

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        """x after step i, given the predicted flow v, both of any shape and at least fp32."""
        raise NotImplementedError

    def _log_ratio(self, i: int) -> float:
        """l = log((1 - s) / s) before step i; after the last one it is infinite."""
        sigma = self.sigmas[i]
        return math.log(1 - sigma) - math.log(sigma) if sigma else math.inf


class Euler(Solver):
    """diffusers' FlowMatchEulerDiscreteScheduler."""

    def schedule(self, steps: int, shift: float) -> list[float]:
        least = shifted(1 / TRAINED_STEPS, shift)  # which is moved up once more with all the others
        return [shifted(float(level), shift) for level in np.linspace(1, least, steps)]

    def time(self, sigma: float) -> float:
        return float(np.float32(np.float32(sigma) * TRAINED_STEPS))

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * v


class DPM(Solver):
    """diffusers' DPMSolverMultistepScheduler: dpmsolver++ of order 2, midpoint."""

    def __init__(self, steps: int, shift: float) -> None:
        super().__init__(steps, shift)
        self._before: Tensor | None = None

    @property
    def memory(self) -> dict[str, Tensor]:
        return {} if self._before is None else {"before": self._before}

    def recall(self, i: int, memory: Mapping[str, Tensor]) -> None:
        self._before = memory.get("before")

    def schedule(self, steps: int, shift: float) -> list[float]:
        levels = 1 - np.linspace(1, 1 / TRAINED_STEPS, steps + 1)
        return [shifted(float(level), shift) for level in levels[:0:-1]]

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        video = x - sigma * v
        estimate, before, self._before = video, self._before, video
        if before is not None and sigma_next:
            h, earlier = self._log_ratio(i + 1) - self._log_ratio(i), self._log_ratio(i) - self._log_ratio(i - 1)
            estimate = video + (0.5 * h / earlier) * (video - before)
        return _towards(x, estimate, sigma, sigma_next, self._log_ratio(i + 1) - self._log_ratio(i))


class UniPC(Solver):
    """diffusers' UniPCMultistepScheduler: order 2, bh2, each step corrected when the next prediction is there."""

    def __init__(self, steps: int, shift: float) -> None:
        super().__init__(steps, shift)
        self._videos: list[Tensor] = []  # predicted before the last steps, the latest last; at most two
        self._sample: Tensor | None = None  # before the last step
        self._order = 1  # of the last step

    @property
    def memory(self) -> dict[str, Tensor]:
        tensors = {f"video{k}": video for k, video in enumerate(self._videos)}
        return tensors if self._sample is None else {**tensors, "sample": self._sample}

    def recall(self, i: int, memory: Mapping[str, Tensor]) -> None:
        self._videos = [memory[name] for name in ("video0", "video1") if name in memory]
        self._sample = memory.get("sample")
        self._order = self._order_at(i - 1, len(self._videos))

    def _order_at(self, i: int, videos: int) -> int:
        """Of step i, with this many predictions: the first and the last step are of order 1."""
        return min(2, len(self) - i, videos)

    def schedule(self, steps: int, shift: float) -> list[float]:
        levels = [shifted(float(level), shift) for level in np.linspace(1, 1 / TRAINED_STEPS, steps + 1)[:-1]]
        return [levels[0] - _FIRST_BELOW_ONE * (abs(levels[0] - 1) < _FIRST_BELOW_ONE), *levels[1:]]

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        video = x - self.sigmas[i] * v
        if self._sample is not None:
            x = self._corrected(i, self._sample, video)
        self._videos, self._sample = [*self._videos[-1:], video], x
        self._order = self._order_at(i, len(self._videos))
        h, estimate = self._log_ratio(i + 1) - self._log_ratio(i), video
        if self._order == 2:
            ratio = (self._log_ratio(i - 1) - self._log_ratio(i)) / h
            estimate = video + (0.5 / ratio) * (self._videos[-2] - video)
        return _towards(x, estimate, self.sigmas[i], self.sigmas[i + 1], h)

    def _corrected(self, i: int, x: Tensor, video: Tensor) -> Tensor:
        """The sample before step i, from the one before step i - 1, now that the video predicted at i is known."""
        h = self._log_ratio(i) - self._log_ratio(i - 1)
        latest, weight = self._videos[-1], 0.5
        estimate = latest
        if self._order == 2:
            # The weights of both differences solve w_0 + w_1 = b_0, ratio w_0 + w_1 = b_1.
            ratio = (self._log_ratio(i - 2) - self._log_ratio(i - 1)) / h
            growth = math.expm1(-h)
            first = growth / -h - 1
            b0, b1 = first / growth, 2 * (first / -h - 0.5) / growth
            earlier = (b1 - b0) / (ratio - 1)
            weight = b0 - earlier
            estimate = latest + (earlier / ratio) * (self._videos[-2] - latest)
        estimate = estimate + weight * (video - latest)
        return _towards(x, estimate, self.sigmas[i - 1], self.sigmas[i], h)


def _towards(x: Tensor, video: Tensor, sigma: float, sigma_next: float, h: float) -> Tensor:
    """From one noise level to a following one, along an estimate of the video: exact where that is constant."""
    return (sigma_next / sigma) * x - ((1 - sigma_next) * math.expm1(-h)) * video


_CLASSES: Mapping[str, type[Solver]] = dict(zip(SOLVERS, (UniPC, DPM, Euler)))


def new_solver(name: str, steps: int, shift: float) -> Solver:
    """A solver by its name of `SOLVERS`. ValueError for another one, and as of `Solver`."""
    if name not in SOLVERS:
        raise ValueError(f"solver is {name!r}; choose one of {', '.join(SOLVERS)}")
    return _CLASSES[name](steps, shift)
