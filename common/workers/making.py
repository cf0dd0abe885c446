"""Groups of ranks as they are asked for, whether of this machine or of a Ray cluster. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.workers.group import Event, Job, WorkerGroup
from common.workers.local import LocalGroup
from common.workers.orders import Maker
from common.workers.replicas import Replicas


@dataclass(frozen=True)
class Groups:
    """`replicas` groups of `ranks` each."""

    ranks: int
    replicas: int
    on_cpu: bool
    ray: str | None
    """The address of a cluster, `auto` for the one that the environment names; None: this machine."""
    keep_loaded: bool
    """Models stay between jobs where memory allows."""
    timeout: float
    """Seconds after which ranks that say nothing are ended."""
    debug: bool = False
    """What ranks of this machine write on stderr goes to the screen."""
    makers: tuple[Maker, ...] = ()
    """Of forks that are not registered."""

    def check(self) -> None:
        """Whether they can be there at all, as far as that is known at once. GroupError says what to do."""
        if self.ray is not None:
            from common.workers.ray_cluster import check

            check(self.ray, self.on_cpu, self.ranks * self.replicas)

    def at_work(self, take: Callable[[float], Job | None], tell: Callable[[int, Event], None]) -> Replicas:
        """The groups, which take their jobs from one queue and say what became of them; not yet started."""
        devices = [range(i * self.ranks, (i + 1) * self.ranks) for i in range(self.replicas)]
        return Replicas(self._group, devices, take, tell, self.makers)

    def _group(self, devices: Sequence[int]) -> WorkerGroup:
        if self.ray is None:
            return LocalGroup(
                devices, self.on_cpu, self.keep_loaded, self.timeout, self.replicas, self.makers, self.debug
            )
        from common.workers.ray_group import RayGroup

        return RayGroup(len(devices), self.on_cpu, self.ray, self.keep_loaded, self.timeout, self.makers)
