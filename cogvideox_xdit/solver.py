"""The checkpoint's own scheduler from diffusers, driven on shards.

DDIM draws nothing after the initial noise. DPM (2M SDE) adds noise at every step; its `step` draws that noise in the
shape it is given, which would be the shard's. So the update is written out here from the scheduler's own coefficients,
with noise that was drawn full size and then sharded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from common.video.previews import Levels

SCHEDULERS: Mapping[str, str] = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}


class Solver:
    """One generation's steps from noise to latents.

    raw: the checkpoint's scheduler_config.json. name: `ddim` or `dpm` instead of the checkpoint's class, with the
    official demo's spacing of the steps (trailing). steps: of the whole schedule. strength: the part of it that is
    run, as in video to video. Raises ValueError for an unknown scheduler or too few or many steps.
    """

    def __init__(self, raw: Mapping[str, Any], steps: int, name: str | None = None, strength: float = 1.0) -> None:
        self.scheduler = _build(raw, name)
        self.second_order = type(self.scheduler).__name__ == SCHEDULERS["dpm"]
        train_steps = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= train_steps:
            raise ValueError(f"the number of steps is {steps}; it must be 1 to {train_steps}")
        self.scheduler.set_timesteps(steps)
        run = min(int(steps * strength), steps)
        if run < 1:
            raise ValueError(f"strength {strength} of {steps} steps leaves no step; raise one of them")
        self.timesteps: list[int] = self.scheduler.timesteps.tolist()[steps - run :]
        self.spacing = train_steps // steps
        alphas = [(float(alpha), float(alpha_next)) for alpha, alpha_next, _ in map(self._alphas, range(len(self)))]
        self.levels: tuple[Levels, ...] = tuple((a**0.5, (1 - a) ** 0.5, b**0.5, (1 - b) ** 0.5) for a, b in alphas)
        """Of each step: how much of the video and how much noise is in the latents before it, and after it."""
        self._before: Tensor | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def memory(self) -> dict[str, Tensor]:
        """What is remembered of the steps before, by name; each like the latents."""
        return {} if self._before is None else {"before": self._before}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from where `memory` was taken; names of others are passed over."""
        self._before = memory.get("before")

    def add_noise(self, z: Tensor, noise: Tensor) -> Tensor:
        """Latents as they look at the first step that is run."""
        return self.scheduler.add_noise(z, noise, torch.tensor(self.timesteps[:1]))

    def step(self, i: int, x: Tensor, v: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """x after step i, given the predicted v; any shape, since all of it is elementwise.

        draw: noise like x; called as often as the reference draws, so that a seed means the same there and here.
        """
        if not self.second_order:
            return self.scheduler.step(v, self.timesteps[i], x, return_dict=False)[0]
        alpha, alpha_next, alpha_before = self._alphas(i)
        x0 = alpha**0.5 * x - (1 - alpha) ** 0.5 * v
        h, r, *_ = self.scheduler.get_variables(alpha, alpha_next, alpha_before)
        keep, lead, *blend = self.scheduler.get_mult(h, r, alpha, alpha_next, alpha_before)
        noise = draw()
        estimate = x0
        if self._before is not None and self.timesteps[i] >= self.spacing:
            # The reference draws for a first-order step, then once more for the second-order one it takes instead.
            noise = draw()
            estimate = blend[0] * x0 - blend[1] * self._before
        self._before = x0
        spread = (1 - alpha_next) ** 0.5 * (1 - (-2 * h).exp()) ** 0.5
        return keep * x - lead * estimate + spread * noise

    def _alphas(self, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cumulative alphas (fp64 scalars) at step i, after it, and at the step before."""
        table, t = self.scheduler.alphas_cumprod, self.timesteps[i]
        alpha_next = table[t - self.spacing] if t >= self.spacing else self.scheduler.final_alpha_cumprod
        return table[t], alpha_next, table[self.timesteps[i - 1]] if i else None


def _build(raw: Mapping[str, Any], name: str | None) -> Any:
    import diffusers

    settings = {key: value for key, value in raw.items() if not key.startswith("_")}
    kind = raw.get("_class_name", SCHEDULERS["ddim"])
    if name is not None:
        if name not in SCHEDULERS:
            raise ValueError(f"scheduler is {name!r}; choose one of {', '.join(SCHEDULERS)}")
        kind, settings = SCHEDULERS[name], settings | {"timestep_spacing": "trailing"}
    if kind not in SCHEDULERS.values():
        raise ValueError(f"scheduler_config.json says _class_name={kind!r}; known: {', '.join(SCHEDULERS.values())}")
    if settings.get("prediction_type", "epsilon") != "v_prediction":
        raise ValueError(
            f"scheduler_config.json says prediction_type={settings.get('prediction_type', 'epsilon')!r}; "
            "supported is 'v_prediction'"
        )
    scheduler_class = getattr(diffusers, kind)
    parameters = inspect.signature(scheduler_class.__init__).parameters
    for key, value in settings.items():
        if key not in parameters and value not in (None, False):
            raise ValueError(f"scheduler_config.json says {key}={value!r}, which {kind} does not know")
    return scheduler_class.from_config(settings)


def dynamic_scale(scale: float, t: int, steps: int) -> float:
    """The guidance scale at training timestep t (0 to 999) when it varies over `steps` steps.

    The reference and the training code put the timestep, not the step's number, into a formula meant for the latter,
    so the scale swings; kept, because that is what published results were made with.
    """
    return 1 + scale * (1 - math.cos(math.pi * ((steps - t) / steps) ** 5)) / 2
