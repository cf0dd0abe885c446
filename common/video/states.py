"""Sampling that can end after any step and be gone on with later, on another layout: what a loop says for that.

    state = keeper.begin(sp, {"z": z}, lengths, steps, view)
    z = state.shards["z"]
    for i in range(state.step, steps):
        ...
        keeper.keep(i + 1, {"z": z})

A state is what the next step needs and cannot compute again: the tokens, what a solver remembers of the steps before,
and the generator that it draws from. It has no trace of how many ranks there were. Its `View` says how to see the video
in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.parallel.usp import SequenceParallel
from common.video.previews import View


@dataclass(frozen=True)
class State:
    """What a sampling has come to after some steps."""

    step: int
    """How many steps are done."""
    shards: Mapping[str, Tensor]
    """This rank's tokens (1, n, ...)."""
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    """The same on every rank, on the CPU."""


Deliver = Callable[[int, int, Mapping[str, Tensor], Mapping[str, Tensor], View | None], None]
"""(step, steps, shards, whole, view), all on the CPU: takes a state out of the process."""


class StateKeeper:
    """A loop's beginning, and what it leaves after each step. Without arguments: at noise, and nothing.

    load: reads a state with the tokens of all ranks, in every rank; collective. deliver: called in a thread of its own,
    so that the next step is under way meanwhile, and one call after another.
    gather: deliver the tokens of all ranks, not those of this one. due: with gather, whether now; asked after each
    step, of which the last is always due; must be the same on every rank, collective.
    """

    def __init__(
        self,
        load: Callable[[], State] | None = None,
        deliver: Deliver | None = None,
        gather: bool = False,
        due: Callable[[], bool] = lambda: True,
    ) -> None:
        self._load, self._deliver, self._gather, self._due = load, deliver, gather, due
        self._worker = ThreadPoolExecutor(1) if deliver is not None else None
        self._delivery: Future[None] | None = None

    def begin(
        self,
        sp: SequenceParallel,
        shards: Mapping[str, Tensor],
        lengths: Sequence[int],
        steps: int,
        view: View | None = None,
    ) -> State:
        """The state to begin with: a kept one, else step 0 of `shards`, this rank's tokens (1, n, ...).

        lengths: every rank's n. view: of the states, for previews. A kept state has what was kept, which may be more
        names than `shards` has. Raises ValueError when it is of another sampling. Collective.
        """
        self._sp, self._lengths, self._steps, self._view = sp, lengths, steps, view
        if self._load is None:
            self._hand_over(0, {}, {})
            return State(0, shards)
        state = self._load()
        if state.step > steps or not shards.keys() <= state.shards.keys():
            raise ValueError("the kept state is of another sampling")
        if any(tensor.shape[1] != sum(lengths) for tensor in state.shards.values()):
            raise ValueError("the kept state is of another size")
        (like, *_) = shards.values()
        tokens = {name: sp.shard(tensor.to(like.device)) for name, tensor in state.shards.items()}
        return State(state.step, tokens, state.whole)

    def keep(self, step: int, shards: Mapping[str, Tensor], whole: Mapping[str, Tensor] | None = None) -> None:
        """The state after `step` steps; its tensors must not be written into afterwards. Collective with `gather`."""
        if self._gather and (step == self._steps or self._due()):
            shards = {name: self._sp.gather(tensor, self._lengths) for name, tensor in shards.items()}
        elif self._gather:
            return
        self._hand_over(step, shards, whole or {})

    def wait(self) -> None:
        """Until what was kept last is delivered."""
        if self._delivery is not None:
            self._delivery.result()

    def _hand_over(self, step: int, shards: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        if self._worker is None:
            return
        self.wait()
        ready = [torch.cuda.Event() for tensor in shards.values() if tensor.is_cuda][:1]
        for event in ready:
            event.record()
        self._delivery = self._worker.submit(self._deliver_copy, step, shards, whole, ready)

    def _deliver_copy(
        self, step: int, shards: Mapping[str, Tensor], whole: Mapping[str, Tensor], ready: list[torch.cuda.Event]
    ) -> None:
        assert self._deliver is not None
        for event in ready:
            event.synchronize()
        # A copy to the host in the stream of this thread, which is not the one that the next step is in.
        stream = torch.cuda.Stream(next(iter(shards.values())).device) if ready else None
        with torch.cuda.stream(stream):
            copies = {name: tensor.to("cpu") for name, tensor in shards.items()}
        self._deliver(step, self._steps, copies, whole, self._view)
