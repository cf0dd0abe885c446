"""A rank's side of sampling that can be gone on with: where it begins, and its part of each step's state."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.parallel.mesh import Mesh, on_main
from common.registry.request import Request
from common.run.states import SHARDED, VIEW, WHOLE, At, Slots
from common.video.previews import View
from common.video.states import Deliver, State, StateKeeper


def keeper_of(request: Request, mesh: Mesh, index: int) -> StateKeeper:
    """The keeper of the request's video `index` (from 0). Nothing is kept where the request names no slots.

    Where every rank of a sequence has slots that its parent reads, each writes its own tokens after each step. Where
    rank 0 alone has (alone, or under torchrun), it gathers them now and then.
    """
    unfinished = request.unfinished
    load = None
    if unfinished is not None and unfinished.video == index and unfinished.step:
        load = partial(on_main, mesh, partial(read_state, unfinished.path))
    slots, sequence = request.slots, mesh.sequence
    if not slots:
        return StateKeeper(load)
    if len(slots) == sequence.size:
        mine = slots[sequence.rank] if mesh.cfg.rank == 0 else None
        return StateKeeper(load, None if mine is None else _deliver(Slots(mine), index))
    deliver = _deliver(Slots(slots[0]), index) if mesh.is_main else None
    return StateKeeper(load, deliver, gather=True, due=_clock(mesh, request.save_every))


def _deliver(slots: Slots, index: int) -> Deliver:
    def deliver(
        step: int, steps: int, shards: Mapping[str, Tensor], whole: Mapping[str, Tensor], view: View | None
    ) -> None:
        slots.write(At(index, step), steps, pack(shards, whole, view))

    return deliver


def pack(shards: Mapping[str, Tensor], whole: Mapping[str, Tensor], view: View | None = None) -> bytes:
    """One rank's part of a state as `common.run.states.join` takes it; nothing for nothing."""
    tensors = {SHARDED + name: tensor.contiguous() for name, tensor in shards.items()}
    tensors |= {WHOLE + name: tensor.contiguous() for name, tensor in whole.items()}
    return save(tensors, None if view is None else {VIEW: view.text}) if tensors else b""


def read_state(path: Path) -> State:
    """The state in a file of `common.run.states.StateFile`, with the tokens of all ranks. ValueError for another."""
    shards: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), "pt") as file:
            step = int(file.metadata()["step"])
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                where, prefix = (shards, SHARDED) if name.startswith(SHARDED) else (whole, WHOLE)
                where[name.removeprefix(prefix)] = file.get_tensor(name)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no state of a sampling: {error}") from None
    return State(step, shards, whole)


def _clock(mesh: Mesh, seconds: float) -> Callable[[], bool]:
    """Whether `seconds` have gone since it last was time, by rank 0's clock, on every rank. Collective."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        answer = torch.tensor(time.monotonic() - last >= seconds)
        if mesh.world.group is not None:
            dist.broadcast(answer, group=mesh.world.group, group_src=0)
        if answer:
            last = time.monotonic()
        return bool(answer)

    return due
