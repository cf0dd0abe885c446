"""A generation from text features to frames, rank by rank, on fake GPUs: what was asked for, and running it."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from common.parallel.mesh import Mesh
from common.registry.layout import Layout
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.recorder import Collective, Record, fake_groups, fake_mesh
from tests.rehearsal.trace import Trace, Where
from tests.rehearsal.tracer import Tracer, tracing

AXES = ("world", "cfg", "sequence", "ring", "ulysses", "weights")
STEPS = 2
WORDS = 37
"""Tokens of the prompt that are no padding, where a model drops padding."""


@dataclass(frozen=True)
class Scene:
    """One way to run a model. The fields are the pipelines' options.

    shard: `shard_weights`. compiled: the blocks, as far as dynamo goes. groups: `overlap_groups`. turns:
    `interleave_branches`. video: starts from one. layers: None for all. latents: latent frames of the video; None for
    as many as the published one has. Chunks of frames are alike, so a few stand for all.
    """

    model: str
    layout: Layout = field(default_factory=Layout)
    capability: tuple[int, int] = (9, 0)
    attention: str = "auto"
    dtype: str = "bf16"
    offload: str = "stage"
    shard: bool = False
    compiled: bool = False
    groups: int = 1
    turns: bool = False
    scheduler: str | None = None
    video: bool = False
    vae: str = "exact"
    output: str = "frames"
    layers: int | None = None
    latents: int | None = None

    def __str__(self) -> str:
        said = [self.model, str(self.layout), ".".join(map(str, self.capability)), self.attention, self.dtype]
        said += [self.offload] + ["sharded"] * self.shard + ["compiled"] * self.compiled
        said += [f"groups {self.groups}"] * (self.groups > 1) + ["in turn"] * self.turns
        said += [self.scheduler or ""] + ["from a video"] * self.video
        said += [f"vae {self.vae}" if self.output == "frames" else self.output]
        said += [f"{self.layers} blocks"] * (self.layers is not None)
        said += [f"{self.latents} latent frames"] * (self.latents is not None)
        return ", ".join(part for part in said if part)


@dataclass
class Ran:
    """What came of a rank: its trace and record, and what it returned. axes: its groups' names by axis."""

    rank: int
    axes: Mapping[str, str]
    trace: Trace
    record: Record
    result: Any


class Unheard(Exception):
    """A rank was to hear what another, which has not come so far, will say."""


@dataclass
class Spoken:
    """What ranks told each other as Python objects: by group and number of the call, then by rank."""

    said: dict[tuple[str, int], dict[int, Any]] = field(default_factory=dict)

    def hear(self, group: str, call: int, rank: int, own: Any, ranks: tuple[int, ...]) -> list[Any]:
        """Everybody's word of this call; raises Unheard while somebody's is missing."""
        words = self.said.setdefault((group, call), {})
        words[rank] = own
        if any(other not in words for other in ranks):
            raise Unheard
        return [words[other] for other in ranks]


Work = Callable[[Mesh, Tracer], Any]


def run_ranks(scene: Scene, work: Work, answers: Mapping[Where, Callable[[Tensor], Any]]) -> list[Ran]:
    """`work` on every rank of the scene's layout, one after the other; again for those that heard nothing at first."""
    spoken, waiting, ran = Spoken(), deque(range(scene.layout.ranks)), {}
    tries = 0
    while waiting:
        rank = waiting.popleft()
        try:
            ran[rank] = run_rank(scene, rank, work, answers, spoken)
            tries = 0
        except Unheard:
            waiting.append(rank)
            tries += 1
            assert tries <= 2 * scene.layout.ranks, "ranks wait for each other's words"
    return [ran[rank] for rank in range(scene.layout.ranks)]


def run_rank(
    scene: Scene, rank: int, work: Work, answers: Mapping[Where, Callable[[Tensor], Any]], spoken: Spoken | None = None
) -> Ran:
    """`work(mesh, tracer)` as one rank; see `Tracer` for answers."""
    layout, device = scene.layout, torch.device("cuda", rank % 8)
    tracers: list[Tracer] = []

    with little_to_collect(), fake_cuda(scene.capability, real_inputs=True) as machine:
        machine.set_device(device)

        def watch(record: Record) -> Tracer:
            tracers.append(Tracer(record, machine, answers, WORDS))
            return tracers[0]

        with fake_groups(rank, layout.ranks, watch) as record:
            (tracer,) = tracers
            mesh = Mesh(layout=layout, device=device) if layout.ranks == 1 else fake_mesh(layout, device)
            with tracing(tracer), spoken_objects(record, tracer, spoken or Spoken()):
                result = work(mesh, tracer)
            axes = {name: axis.group.group_name for name in AXES if (axis := getattr(mesh, name)).group is not None}
    return Ran(rank, axes, tracer.trace, record, result)


@contextmanager
def little_to_collect() -> Iterator[None]:
    """The product collects garbage between its stages: what is there already, such as other ranks' traces, is not
    looked through each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def spoken_objects(record: Record, tracer: Tracer, spoken: Spoken) -> Iterator[None]:
    """Python objects between ranks: a fake group would bring nothing, so they are passed on here."""
    calls: dict[str, int] = {}

    def call(op: str, group: Any, own: Any, device: Any, source: int | None) -> list[Any]:
        group = group or dist.group.WORLD
        name = group.group_name
        calls[name] = calls.get(name, -1) + 1
        ranks = record.made[name].ranks
        kind = "cpu" if device is None else torch.device(device).type
        collective = Collective(op, name, (((), torch.uint8, kind),), True, (), source)
        tracer.finish(collective)
        if source is None:
            return spoken.hear(name, calls[name], record.rank, own, ranks)
        words = spoken.said.setdefault((name, calls[name]), {})
        if ranks[source] == record.rank:
            words[record.rank] = own
        if ranks[source] not in words:
            raise Unheard
        return [words[ranks[source]]]

    def broadcast(box: list[Any], src: Any = None, group: Any = None, device: Any = None, group_src: int = 0) -> None:
        box[:] = call("broadcast_object", group, list(box), device, group_src)[0]

    def gather(box: list[Any], own: Any, group: Any = None) -> None:
        box[:] = call("all_gather_object", group, own, None, None)

    with mock.patch.multiple(dist, broadcast_object_list=broadcast, all_gather_object=gather):
        yield
