"""Steps on shards against the installed schedulers on whole latents."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from cogvideox_xdit.solver import SCHEDULERS, Solver, dynamic_scale

RAW = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
}
SHAPE = (1, 3, 4, 2, 2)


def model(x: torch.Tensor, t: int) -> torch.Tensor:
    return torch.sin(3 * x) + t / 1000


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_run_equals_the_reference_schedulers_with_the_same_draws(name: str, steps: int, shift: float) -> None:
    raw = RAW | {"_class_name": SCHEDULERS[name], "snr_shift_scale": shift}
    theirs = getattr(diffusers, SCHEDULERS[name])(**{k: v for k, v in raw.items() if k != "_class_name"})
    theirs.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    expected, old = x, None
    for i, t in enumerate(theirs.timesteps):
        v = model(expected, int(t))
        if name == "dpm":
            back = theirs.timesteps[i - 1] if i else None
            expected, old = theirs.step(v, old, t, back, expected, generator=generators[0])
        else:
            expected = theirs.step(v, t, expected, return_dict=False)[0]
    solver = Solver(raw, steps)
    for i, t in enumerate(solver.timesteps):
        x = solver.step(i, x, model(x, t), lambda: torch.randn(SHAPE, generator=generators[1]))
    assert (x - expected).abs().max() < 1e-6
    assert torch.equal(*(torch.rand(4, generator=g) for g in generators)), "the number of draws differs"


def test_dpm_uses_the_second_of_two_draws_and_only_one_on_first_and_last_step() -> None:
    solver = Solver(RAW, 4, "dpm")
    draws = []
    x = torch.zeros(1)

    def draw() -> torch.Tensor:
        draws.append(len(draws))
        return torch.tensor([float(len(draws))])

    counts = []
    for i in range(4):
        before = len(draws)
        x = solver.step(i, x, torch.zeros(1), draw)
        counts.append(len(draws) - before)
    assert counts == [1, 2, 2, 1]


def test_the_schedule_matches_recorded_figures() -> None:
    """Figures computed by hand from the formulas: zero terminal SNR after the shift, trailing steps."""
    for shift, first, middle in ((3.0, 0.9974543276, 0.09596956), (1.0, 0.99915, 0.2423591666)):
        alphas = Solver(RAW | {"snr_shift_scale": shift}, 50).scheduler.alphas_cumprod
        assert alphas[0].item() == pytest.approx(first, abs=1e-9)
        assert alphas[499].item() == pytest.approx(middle, abs=1e-7)
        assert alphas[999] == 0
    assert Solver(RAW, 50).timesteps == list(range(999, 0, -20))


def test_video_to_video_runs_the_last_steps_and_noises_as_the_reference() -> None:
    solver = Solver(RAW, 10, strength=0.35)
    assert solver.timesteps == [299, 199, 99]
    z, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    theirs = CogVideoXDDIMScheduler(**RAW).add_noise(z, noise, torch.tensor([299]))
    assert torch.equal(solver.add_noise(z, noise), theirs)
    with pytest.raises(ValueError, match=r"strength 0\.05 of 10 steps leaves no step"):
        Solver(RAW, 10, strength=0.05)


def test_an_override_takes_the_demo_spacing_and_keeps_the_checkpoint_numbers() -> None:
    solver = Solver(RAW | {"timestep_spacing": "linspace"}, 50, "dpm")
    assert isinstance(solver.scheduler, CogVideoXDPMScheduler)
    assert solver.timesteps[-1] == 19
    assert Solver(RAW | {"timestep_spacing": "linspace"}, 50).timesteps[-1] == 0


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, None, "_class_name='EulerDiscreteScheduler'"),
        ({"prediction_type": "epsilon"}, None, "prediction_type='epsilon'"),
        ({"solver_order": 3}, None, "solver_order=3, which CogVideoXDDIMScheduler does not know"),
        ({}, "euler", "choose one of ddim, dpm"),
    ],
)
def test_an_unknown_scheduler_is_named(change: dict[str, str], name: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Solver(RAW | change, 10, name)


def test_the_dynamic_scale_takes_the_raw_timestep() -> None:
    """At 50 steps and scale 6 it swings: these are the reference's values, not a smooth rise."""
    for t, expected in ((999, 2.291), (799, 1.005), (199, 6.999), (19, 1.123)):
        assert dynamic_scale(6, t, 50) == pytest.approx(expected, abs=1e-3)
