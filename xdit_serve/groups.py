"""The groups of ranks that a server works with: on this machine's devices, or over a Ray cluster. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.registry.forks import Size
from common.registry.layout import MOST_RANKS
from common.system import environment
from common.workers.group import GroupError
from common.workers.making import Groups
from xdit_serve.dispatch import MakeWorkers
from xdit_serve.offers import Offer

CPU_RANKS = 2
"""Of a group on a CPU, where nobody says how many."""


@dataclass(frozen=True)
class Deployment:
    """Where jobs are made: `replicas` groups of `ranks` each."""

    on_cpu: bool
    ranks: int
    replicas: int
    ray: str | None = None
    """The address of a cluster; None: this machine."""

    @property
    def words(self) -> tuple[str, ...]:
        """For the command line of every job. Of a cluster's GPUs this machine need not have any."""
        words = (f"--device={'cpu' if self.on_cpu else 'cuda'}", f"--gpus={self.ranks}")
        return words if self.ray is None else (*words, f"--ray-address={self.ray}")


def deployment(
    device: str, gpus: int | None, replicas: int | None, ray: str | None, offers: Sequence[Offer] = ()
) -> Deployment:
    """Ranks shared out over groups. ValueError says what does not go.

    device: auto, cpu or cuda. gpus: of all groups together; None: all that are visible, on a CPU two for each group.
    replicas: None: as many as are advised for what is offered on this machine's GPUs.
    """
    visible = environment.visible_gpus()
    on_cpu = device == "cpu" or (device == "auto" and not visible and ray is None)
    if replicas is not None and not 1 <= replicas <= MOST_RANKS:
        raise ValueError(f"--replicas {replicas} is not a number from 1 to {MOST_RANKS}")
    if device == "cuda" and not visible and ray is None:
        raise ValueError("--device cuda: no GPU is visible; use --device cpu, or check CUDA_VISIBLE_DEVICES")
    if gpus is None and ray is not None:
        raise ValueError("--ray-address: say with --gpus how many of the cluster's GPUs there are for all replicas")
    if gpus is None:
        gpus = CPU_RANKS * (replicas or 1) if on_cpu else visible
    if not 1 <= gpus <= MOST_RANKS:
        raise ValueError(f"--gpus {gpus} is not a number from 1 to {MOST_RANKS}")
    if not on_cpu and ray is None and gpus > visible:
        raise ValueError(f"--gpus {gpus}, but {visible} GPU{' is' if visible == 1 else 's are'} visible")
    if replicas is None:
        replicas = 1 if on_cpu or ray is not None else advised(offers, gpus)
    if gpus % replicas:
        divisors = ", ".join(str(count) for count in range(1, gpus + 1) if gpus % count == 0)
        raise ValueError(f"--replicas {replicas} does not divide --gpus {gpus}; choose of {divisors}")
    return Deployment(on_cpu, gpus // replicas, replicas, ray)


def advised(offers: Sequence[Offer], ranks: int) -> int:
    """The groups that make most videos by the planner, of those for each model the fewest; 1 where it cannot tell."""
    if ranks == 1:
        return 1
    from planner import layouts  # not needed where the number is given

    counts = []
    for rules, fork in ((offer.rules, offer.fork) for offer in offers):
        guided = rules.guided(rules.cfg_scale)
        size = Size(rules.width, rules.height, rules.num_frames, rules.num_steps, guided)
        counts.append(layouts.choose_replicas(fork.names, ranks, rules.heads, guided, None, "cuda", size))
    return min(counts, default=1)


def workers(at: Deployment, keep_loaded: bool, timeout: float, debug: bool) -> MakeWorkers:
    """What makes the groups. timeout: seconds after which ranks that hang are ended. ValueError: they cannot be."""
    groups = Groups(at.ranks, at.replicas, at.on_cpu, at.ray, keep_loaded, timeout, debug)
    try:
        groups.check()
    except GroupError as error:
        raise ValueError(f"--ray-address: {error}") from None
    return groups.at_work
