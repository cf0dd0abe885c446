"""A worker group of processes of this machine. No torch here: the ranks import it."""

from __future__ import annotations

import os
import selectors
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.run.children import Child, end_all, pipe, read, scratch, shared_environment, start_rank
from common.run.states import Slots
from common.system.environment import LIFE, open_standard_streams
from common.system.failure import Failure
from common.system.host import resident_bytes
from common.workers.orders import Hello, Maker, Message, framed
from common.workers.watched import Ranks, Seat, Watched

CHILD = Path(__file__).with_name("child.py")


class LocalGroup(Watched):
    """`common.workers.group.WorkerGroup` over processes of this machine.

    devices: a rank for each; GPUs by their numbers in this process, or on a CPU any numbers. on_cpu: which of the two.
    keep_loaded: models stay between jobs where memory allows. timeout: seconds in which a rank must say something
    while it has work, and the ranks must have met. share: groups that compute on this machine's cores, this one among
    them. makers: of forks that are not registered. debug: what the ranks write on stderr goes to the screen.
    """

    def __init__(
        self,
        devices: Sequence[int],
        on_cpu: bool,
        keep_loaded: bool = True,
        timeout: float = 1800.0,
        share: int = 1,
        makers: Sequence[Maker] = (),
        debug: bool = False,
    ) -> None:
        super().__init__(devices, on_cpu, keep_loaded, timeout, makers)
        self.share, self.debug = share, debug

    @contextmanager
    def _new_ranks(self) -> Iterator[Ranks]:
        open_standard_streams()
        with ExitStack() as stack:
            life, _ = stack.enter_context(pipe())
            woken, wake = stack.enter_context(pipe())
            os.set_blocking(woken, False)
            slots = []
            for _ in self.devices:
                slots.append(Slots.create())
                stack.callback(slots[-1].close)
            yield _Processes(self, slots, life, woken, wake)


@dataclass
class _Rank:
    """A rank's process."""

    seat: Seat
    child: Child
    orders: int
    outgoing: bytearray = field(default_factory=bytearray)
    """What its pipe has not taken yet."""

    def flush(self) -> None:
        with suppress(BlockingIOError, BrokenPipeError):
            while self.outgoing:
                del self.outgoing[: os.write(self.orders, self.outgoing)]


class _Processes(Ranks):
    """The ranks as processes. life, woken, wake: ends of pipes."""

    group: LocalGroup

    def __init__(self, group: LocalGroup, slots: Sequence[Slots], life: int, woken: int, wake: int) -> None:
        super().__init__(group, slots)
        self._life, self._woken, self._wake = life, woken, wake
        self._all: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(woken, selectors.EVENT_READ)

    def start(self) -> None:
        group = self.group
        common = _environment(group) | {LIFE: str(self._life)}
        descriptors = (self._life, *(descriptor for one in self.slots for descriptor in one.descriptors))
        for rank in range(len(group.devices)):
            self._all.append(_started(rank, common, descriptors, group.debug))
            self.seats.append(self._all[-1].seat)
            self._selector.register(self._all[-1].child.report, selectors.EVENT_READ, self._all[-1])
        self.send(Hello(tuple(sys.path[1:]), group.on_cpu, group.timeout))

    def send(self, message: Message) -> None:
        data = framed(message)
        for rank in self._all:
            rank.outgoing += data
            rank.flush()

    def hear(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                with suppress(BlockingIOError):
                    os.read(self._woken, 4096)
            elif not self._listen(key.data):
                self._selector.unregister(key.fd)
        for rank in self._all:
            rank.flush()

    def wake(self) -> None:
        os.write(self._wake, b".")

    def ended(self) -> dict[int, Failure | None]:
        exits = [(rank, code) for rank in self._all if (code := rank.child.process.poll()) is not None]
        for rank, _ in exits:
            self._listen(rank)  # its last words
        return {rank.seat.rank: rank.child.ending(code) if code else None for rank, code in exits}

    def end(self) -> str:
        survivors = end_all([rank.child for rank in self._all])
        self._selector.close()
        for rank in self._all:
            os.close(rank.orders)
        return survivors

    def memory(self, seat: Seat) -> int:
        """Resident memory of the process; 0 where the system does not say."""
        return resident_bytes(seat.pid)

    def _listen(self, rank: _Rank) -> bool:
        def take(message: dict[str, Any]) -> None:
            self.take(rank.seat, message)

        return read(rank.child, take)


def _started(rank: int, common: dict[str, str], descriptors: Sequence[int], debug: bool) -> _Rank:
    orders, write = os.pipe()
    os.set_blocking(write, False)
    command = [sys.executable, str(CHILD), str(orders), *(["--debug"] if debug else [])]
    try:
        child = start_rank(command, rank, common, None if debug else scratch(), (orders, *descriptors))
    except BaseException:
        os.close(write)
        raise
    finally:
        os.close(orders)
    return _Rank(Seat(rank, child.process.pid), child, write)


def _environment(group: LocalGroup) -> dict[str, str]:
    """GPUs are shown to all ranks in the order of the group's devices, so that rank i has the i-th."""
    common = shared_environment(len(group.devices), group.on_cpu, group.share)
    if not group.on_cpu:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        names = [visible[device] if visible else str(device) for device in group.devices]
        common["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return common
