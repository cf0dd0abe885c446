"""Whether ranks end a job that is cancelled: asked and answered beside their work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from common.system.stopping import Abandoned

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

ASK_SECONDS = 0.05
"""Between two questions where steps are shorter than that."""
MOST_PLACES = 16
"""From one question to the next: steps may become longer."""


class Agreement:
    """Whether any rank wants to leave, known by all ranks at the same place and without waiting for it.

    What is asked at one place is answered where the next question is: by then the slowest rank has been at the first
    for a whole step. With the question go the seconds of a step, so that all ranks leave out the same places.

    group: of all ranks, for this alone; None for one rank. wanted: by this rank. clock: seconds.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        wanted: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group, self._want, self._clock = group, wanted, clock
        self._request: tuple[dist.Work, torch.Tensor] | None = None
        self._stage: str | None = None
        self._then = clock()
        self._every, self._passed = 1, 0

    def ask(self, stage: str | None) -> None:
        """Collective. Raises Abandoned, on all ranks or on none.

        stage: the one that the ranks are in; how long its steps take is found out anew.
        """
        if self._group is None:
            if self._want():
                raise Abandoned
            return
        self._passed += 1
        if stage == self._stage and self._passed < self._every:
            return
        if self.close():
            raise Abandoned
        if stage != self._stage:
            self._stage, self._every = stage, 1
        self._send(self._group)

    def _send(self, group: dist.ProcessGroup) -> None:
        import torch
        import torch.distributed as dist

        now = self._clock()
        values = torch.tensor([self._want(), (now - self._then) / self._passed], dtype=torch.float64)
        self._then, self._passed = now, 0
        work = dist.all_reduce(values, dist.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None
        self._request = work, values

    def close(self) -> bool:
        """Wait for what was asked last, and return the answer."""
        if self._request is None:
            return False
        (work, values), self._request = self._request, None
        work.wait()
        wanted, seconds = values.tolist()
        self._every = max(1, min(MOST_PLACES, int(ASK_SECONDS / max(seconds, 1e-9))))
        return bool(wanted)
