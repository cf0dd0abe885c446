"""A worker group of Ray actors: one for each GPU, or CPU, on any number of machines. Needs the extra `ray`.

The ranks' code is that of any group. Outputs and states are files of the machine that has the first rank: where that is
another than the caller's, both must see the same folder.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from common.run.states import Slots
from common.system.failure import Failure
from common.workers.group import GroupError
from common.workers.orders import Hello, Maker, Message
from common.workers.ray_actor import RankActor
from common.workers.ray_cluster import address_of, connect, named, ray_module, within
from common.workers.watched import Ranks, Seat, Watched

ROOT = Path(__file__).resolve().parents[2]
SETTLE_SECONDS = 10.0
"""For a cluster that has lost a node, or to which one comes back, to know what it has."""
PLACED_SECONDS, BEGUN_SECONDS = 30.0, 120.0
"""For the cluster to reserve what it has free; for all actors' processes to start. Later than that a node has gone."""
THREADS = 4
"""Of an actor: it hears and is spoken to while it works."""


class RayGroup(Watched):
    """`common.workers.group.WorkerGroup` over a Ray cluster.

    ranks: as many as are wanted; a start takes as many as the cluster has, at least one, and `devices` says how many
    these are. on_cpu: a rank has a CPU and no GPU. address: of the cluster; None: RAY_ADDRESS says it, else the one
    that runs on this machine. The rest as for `common.workers.local.LocalGroup`. GroupError where Ray is not installed.
    """

    def __init__(
        self,
        ranks: int,
        on_cpu: bool,
        address: str | None = None,
        keep_loaded: bool = True,
        timeout: float = 1800.0,
        makers: Sequence[Maker] = (),
    ) -> None:
        super().__init__(range(ranks), on_cpu, keep_loaded, timeout, makers)
        self.size, self.address = ranks, address_of(address)
        self.ray = ray_module()

    @contextmanager
    def _new_ranks(self) -> Iterator[Ranks]:
        with ExitStack() as stack:
            slots = []
            for _ in range(self.size):
                slots.append(Slots.create())
                stack.callback(slots[-1].close)
            yield _Actors(self, slots)


class _Actors(Ranks):
    group: RayGroup

    def __init__(self, group: RayGroup, slots: Sequence[Slots]) -> None:
        super().__init__(group, slots)
        self._ray = group.ray
        self._placement_group: Any = None
        self._actors: list[Any] = []
        self._hearing: dict[Any, int] = {}
        self._exits: dict[int, Failure | None] = {}

    def start(self) -> None:
        group, ray = self.group, self._ray
        connect(ray, group.address)
        kind = "CPU" if group.on_cpu else "GPU"
        count = self._count(kind)
        group.devices = tuple(range(count))
        self.slots = self.slots[:count]
        self._place(kind, count)
        places = self._places()
        self.seats += [Seat(rank, pid) for rank, (_, _, pid) in enumerate(places)]
        hello = Hello(tuple(sys.path[1:]), group.on_cpu, group.timeout)
        machines = Counter(place[0] for place in places)
        local_ranks: Counter[str] = Counter()
        for rank, (actor, (machine, _, _)) in enumerate(zip(self._actors, places)):
            env: dict[str, Any] = {"RANK": rank, "WORLD_SIZE": count}
            env |= {"LOCAL_RANK": local_ranks[machine], "LOCAL_WORLD_SIZE": machines[machine]}
            env |= {"MASTER_ADDR": places[0][0], "MASTER_PORT": places[0][1]}
            local_ranks[machine] += 1
            actor.begin.remote({name: str(value) for name, value in env.items()}, hello, os.getcwd())
            self._hearing[actor.hear.remote(1.0)] = rank

    def _count(self, kind: str) -> int:
        """Ranks that the cluster has room for, up to the number that is wanted."""
        end = time.monotonic() + SETTLE_SECONDS
        while (there := self._free(kind)) < self.group.size and time.monotonic() < end:
            self._rest()
        if there < 1:
            raise GroupError(f"{named(self.group.address)} has no free {kind}")
        return min(there, self.group.size)

    def _free(self, kind: str) -> int:
        return int(within(self._ray.available_resources, self.group.address).get(kind, 0))

    def _rest(self) -> None:
        """A moment of a wait. GroupError when the group is to be stopped meanwhile."""
        if self.group.stopping.wait(0.2):
            raise GroupError("the group was stopped while it started")

    def _place(self, kind: str, count: int) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._placement_group = placement_group([{kind: 1}] * count, strategy="PACK")
        end = time.monotonic() + PLACED_SECONDS
        while not self._placement_group.wait(1.0):
            if time.monotonic() > end:
                raise GroupError(f"{named(self.group.address)} does not give {count} {kind}s")
            self._rest()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        options = {"num_cpus": int(kind == "CPU"), "num_gpus": int(kind == "GPU"), "max_concurrency": THREADS}
        remote = self._ray.remote(RankActor)
        for index in range(count):
            where = PlacementGroupSchedulingStrategy(self._placement_group, placement_group_bundle_index=index)
            environment = {"env_vars": {"PYTHONPATH": path}}
            actor = remote.options(**options, scheduling_strategy=where, runtime_env=environment).remote()
            self._actors.append(actor)

    def _places(self) -> list[tuple[str, int, int]]:
        """Where the actors are, once all have begun. One whose node went before that may never begin."""
        refs = [actor.place.remote() for actor in self._actors]
        end = time.monotonic() + BEGUN_SECONDS
        while len(self._ray.wait(refs, num_returns=len(refs), timeout=0)[0]) < len(refs):
            if time.monotonic() > end:
                raise GroupError(f"{named(self.group.address)} does not begin {len(refs)} actors")
            self._rest()
        places: list[tuple[str, int, int]] = self._ray.get(refs)
        return places

    def send(self, message: Message) -> None:
        for actor in self._actors:
            actor.send.remote(message)

    def hear(self, seconds: float) -> None:
        refs = list(self._hearing)
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=seconds) if refs else ([], [])
        # All that are ready now: of a state every rank's part must be there.
        more = [one for one in refs if one not in ready]
        ready += self._ray.wait(more, num_returns=len(more), timeout=0)[0] if more else []
        for one in ready:
            rank = self._hearing.pop(one)
            try:
                messages, parts = self._ray.get(one)
            except self._ray.exceptions.RayError as error:
                self._lost(rank, error)
                continue
            self._hearing[self._actors[rank].hear.remote(1.0)] = rank
            for at, steps, part in parts:
                self.slots[rank].write(at, steps, part)
            for message in messages:
                self._take(rank, message)

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        if "left" in message:
            self._exits[rank] = None
        else:
            self.take(self.seats[rank], message)

    def _lost(self, rank: int, error: Exception) -> None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = f"its actor is gone: {lines[0] if lines else type(error).__name__}"
        self._exits[rank] = Failure(rank, self.seats[rank].stage, message[:300], killed=True)

    def ended(self) -> dict[int, Failure | None]:
        return dict(self._exits)

    def end(self) -> str:
        for actor in self._actors:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)
        if self._placement_group is not None:
            from ray.util.placement_group import remove_placement_group

            with suppress(self._ray.exceptions.RayError):
                remove_placement_group(self._placement_group)
        return ""
