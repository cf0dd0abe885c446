"""Functions that take turns, so that one computes while another waits for what other ranks send it.

    each = Interleaver()
    predictions = each.map(partial(model, z, t), conds)    # a thread for every value after the first

Exactly one runs at a time, each until it says `pass_turn`, which `common.parallel.usp` does before it waits for what
it has not much to do under. Where that is, the code alone decides and not what is ready first: so all ranks post the
same collectives in the same order. Threads that ran freely would not, and NCCL would hang.

All of them work on the caller's CUDA stream, one behind the other. Streams of their own would gain nothing: a group's
exchanges are done in the order they are posted, so what waits for one could only be overtaken by what waits for a later
one; and memory that one function has given up could not be the other's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

A = TypeVar("A")
R = TypeVar("R")


class Interleaver:
    """Runs functions in turn. What is asked of it outside of `map` is answered as for one that runs alone."""

    def __init__(self) -> None:
        self._round: _Round | None = None

    def map(self, function: Callable[[A], R], values: Iterable[A], ahead: int = 0) -> list[R]:
        """`function` of each value, in their order, as the builtin's list.

        ahead: how many of its first turns each one keeps to itself for every one after it, which it leads by them.
        The first is computed by the calling thread, the others by threads that see its grad and inference mode, its
        autocast, dispatch modes and CUDA stream, and that are gone when this returns. An error of one ends the others
        where they pass their turn, and is raised.
        """
        values = list(values)
        if len(values) < 2:
            return [function(value) for value in values]
        assert self._round is None, "functions that take turns do not begin such a round themselves"
        self._round = _Round(len(values), ahead)
        try:
            return self._round.run(function, values)
        finally:
            self._round = None

    def pass_turn(self) -> None:
        """Let the others run until it is this one's turn again."""
        if self._round is not None:
            self._round.pass_turn()

    def reach(self, place: int) -> bool:
        """Say that this one has got to `place` of a row that all go along; whether all have by now.

        Nobody gets two places ahead of another, and nobody from one to the next without having passed the turn.
        """
        return self._round is None or self._round.reach(place)


class _Round:
    """One call of `map`. The first in `order` has the turn."""

    def __init__(self, count: int, ahead: int) -> None:
        self.order = deque(range(count))
        self.lead = [ahead * (count - 1 - own) for own in range(count)]
        self.places = [0] * count
        self.passed = [False] * count
        self.condition = threading.Condition()
        self.failure: BaseException | None = None

    def run(self, function: Callable[[A], R], values: list[A]) -> list[R]:
        state, results = _ThreadState(), dict[int, R]()

        def compute(own: int) -> None:
            try:
                self._await_turn(own)
                results[own] = function(values[own])
            except _Left:
                pass
            except BaseException as error:  # raised by the caller's thread
                self._fail(error)
            finally:
                with self.condition:
                    self.order.remove(own)
                    self.condition.notify_all()

        def compute_apart(own: int) -> None:
            with state.here():
                compute(own)

        threads: list[threading.Thread] = []
        try:
            for own in range(1, len(values)):
                in_context = copy_context().run  # what Python keeps for each thread
                thread = threading.Thread(target=in_context, args=(compute_apart, own), name=f"turn {own}", daemon=True)
                thread.start()
                threads.append(thread)
            compute(0)
            _join(threads)
        except BaseException as error:  # a signal, while this thread waited for the others
            self._fail(error)
            _join(threads)
        try:
            if self.failure is not None:
                raise self.failure
        finally:
            self.failure = None  # its frames hold this round, and memory with it
        return [results[own] for own in range(len(values))]

    def pass_turn(self) -> None:
        own = self.order[0]
        if self.lead[own]:
            self.lead[own] -= 1
            return
        self.passed[own] = True
        with self.condition:
            self.order.rotate(-1)
            self.condition.notify_all()
        self._await_turn(own)

    def reach(self, place: int) -> bool:
        own = self.order[0]
        self.places[own] = place
        if place and not self.passed[own]:
            self.pass_turn()
        while self._slowest() < place - 1:
            self.pass_turn()
        self.passed[own] = False
        return self._slowest() >= place

    def _slowest(self) -> int:
        return min(self.places[own] for own in self.order)

    def _await_turn(self, own: int) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.failure is not None or self.order[0] == own)
        if self.failure is not None:
            raise _Left

    def _fail(self, error: BaseException) -> None:
        with self.condition:
            self.failure = self.failure or error
            self.condition.notify_all()


class _Left(BaseException):
    """Unwinds a function whose turn does not come again, since another has failed."""


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join()


class _ThreadState:
    """What PyTorch keeps for each thread, as the thread that makes this has it."""

    def __init__(self) -> None:
        self.modes, self.cores = _get_current_dispatch_mode_stack(), torch.get_num_threads()
        self.contexts: list[Callable[[], Any]] = []
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self.contexts += [partial(torch.inference_mode, inference), partial(torch.set_grad_enabled, grad)]
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                self.contexts.append(partial(torch.autocast, kind, torch.get_autocast_dtype(kind)))
        if torch.cuda.is_initialized():
            self.contexts.append(partial(torch.cuda.stream, torch.cuda.current_stream()))

    @contextmanager
    def here(self) -> Iterator[None]:
        """Have the same in this thread."""
        # Libraries that PyTorch calls would take every core in a new thread, and round otherwise.
        torch.set_num_threads(self.cores)
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            for mode in self.modes:
                _push_mode(mode)
                stack.callback(_pop_mode, getattr(mode, "_mode_key", None))
            yield
