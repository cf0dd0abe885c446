"""Resident ranks agree on whether a job is left, also where their steps are too short to ask after each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist

from common.parallel.mesh import distributed, side_group
from common.registry.layout import Layout
from common.system.stopping import Abandoned
from common.workers.agreement import ASK_SECONDS, MOST_PLACES, Agreement

STEPS = 100


def left(ranks: int, seconds: float, at: int) -> tuple[int, list[int]]:
    """The step at which this rank leaves, and the steps after which it was asked. seconds: of the last rank's step.

    Of the stage's own beginning is step 0; the last rank wants to leave from step `at` on.
    """
    mesh = distributed(Layout(ulysses=ranks))
    now, step, asked = 0.0, 0, []
    last = mesh.world.rank == ranks - 1

    def wanted() -> bool:
        asked.append(step)
        return last and step >= at

    agreed = Agreement(side_group(mesh, 60), wanted, lambda: now)
    try:
        while step < STEPS:
            now += seconds if last else seconds / 3
            agreed.ask("sampling")
            step += 1
        step = -1
        agreed.ask("decoding")
        agreed.close()
    except Abandoned:
        pass
    dist.barrier()
    return step, asked


@pytest.mark.parametrize("at", [0, 7, 60])
@pytest.mark.parametrize("seconds", [10 * ASK_SECONDS, ASK_SECONDS / 4.5, ASK_SECONDS / 1000])
def test_all_ranks_leave_at_the_same_step_and_soon(run_ranks: Callable, seconds: float, at: int) -> None:
    found = run_ranks(3, left, 3, seconds, at)
    (step, asked), *others = found
    assert all(other == (step, asked) for other in others)
    most = max(1, min(MOST_PLACES, int(ASK_SECONDS / seconds)))
    assert at < step <= at + 2 * most
    assert len(asked) <= 3 + step / most


def test_a_stage_is_asked_from_its_first_place_on(run_ranks: Callable) -> None:
    for step, asked in run_ranks(2, left, 2, ASK_SECONDS / 1000, STEPS):
        assert step == -1 and asked[-1] == -1 and len(asked) < STEPS / 8
