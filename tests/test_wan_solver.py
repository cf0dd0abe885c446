"""Wan's solvers are diffusers' schedulers, on tensors of any shape."""

from __future__ import annotations

import pytest
import torch

from wan_xdit.checkpoint import SOLVERS
from wan_xdit.solver import new_solver


def reference(name: str, shift: float):
    import diffusers

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if name == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    kind = diffusers.UniPCMultistepScheduler if name == "unipc" else diffusers.DPMSolverMultistepScheduler
    return kind(**flow)


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 14, 20, 50])
@pytest.mark.parametrize("name", SOLVERS)
def test_schedule_and_steps_are_the_references(name: str, steps: int, shift: float) -> None:
    theirs, ours = reference(name, shift), new_solver(name, steps, shift)
    theirs.set_timesteps(steps)
    # Euler's levels are rounded twice there.
    close = {"rtol": 0, "atol": 1e-7 if name == "euler" else 0}
    torch.testing.assert_close(torch.tensor(ours.sigmas), theirs.sigmas, **close)
    torch.testing.assert_close(torch.tensor(ours.timesteps), theirs.timesteps.float(), rtol=0, atol=1e-4)
    draw = torch.Generator().manual_seed(steps)
    x = torch.randn(1, 7, 3, generator=draw)
    z = x.double()
    for i, t in enumerate(theirs.timesteps):
        v = torch.randn(1, 7, 3, generator=draw) + 0.3 * x
        x = theirs.step(v, t, x, return_dict=False)[0]
        z = ours.step(i, z, v.double())
        assert (z - x).abs().max() <= 1e-5 * x.abs().max(), i


@pytest.mark.parametrize("name", SOLVERS)
def test_parts_of_a_tensor_are_stepped_as_the_whole(name: str) -> None:
    draw = torch.Generator().manual_seed(1)
    noise, flows = torch.randn(1, 6, 4, generator=draw).double(), torch.randn(4, 1, 6, 4, generator=draw).double()

    def run(part: slice) -> torch.Tensor:
        solver, z = new_solver(name, 4, 5.0), noise[:, part]
        for i in range(4):
            z = solver.step(i, z, flows[i][:, part])
        return z

    assert torch.equal(torch.cat([run(slice(0, 1)), run(slice(1, 6))], dim=1), run(slice(0, 6)))


def test_impossible_solvers_are_refused() -> None:
    for arguments, said in {
        ("ddim", 4, 1.0): "solver is 'ddim'; choose one of unipc, dpm, euler",
        ("unipc", 0, 1.0): "number of steps is 0; it must be 1 to 1000",
        ("unipc", 4, -1.0): "shift is -1.0; it must be above 0",
    }.items():
        with pytest.raises(ValueError, match=said):
            new_solver(*arguments)
