"""The all-to-all through which ranks hand each other tokens, heads, keys and predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from common.parallel.mesh import Axis

Pending = Callable[[], Tensor]
"""An exchange on its way: waits for what comes, and gives it. To be called once."""


def exchange(send: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Pending:
    """All-to-all along dim 0: `sent[i]` rows go to rank i of the axis, `received[i]` rows come from it.

    Posted when this returns. Exchanges of one axis are posted in the same order on all its ranks.
    """
    assert axis.group is not None, "an axis of one rank exchanges nothing"
    # Of what is only counted, on the meta device, nothing may leave.
    way = by_messages if send.is_cpu and dist.get_backend(axis.group) == "gloo" else at_once
    return way(send.contiguous(), sent, received, axis)


def at_once(send: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Pending:
    """One collective operation: on NCCL one kernel on the group's stream. In this form a compiler knows it."""
    assert axis.group is not None
    return partial(collectives.wait_tensor, collectives.all_to_all_single(send, list(received), list(sent), axis.group))


def by_messages(send: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Pending:
    """Messages between pairs of ranks, the fastest way of gloo.

    Its all-to-all is begun by a thread of its own, when that gets a core from the one that computes; a message leaves
    from here, at once. Nothing is sent where there are no rows.
    """
    out = send.new_empty(sum(received), *send.shape[1:])
    there, here = send.split(list(sent)), out.split(list(received))
    messages = PendingMessages(out, axis.pending)
    for step in range(1, axis.size):
        before, after = (axis.rank - step) % axis.size, (axis.rank + step) % axis.size
        if received[before]:  # first, since the leave to send would wait behind what goes the same way
            messages.add(dist.irecv(here[before], group=axis.group, group_src=before), here[before])
        if sent[after]:
            messages.add(dist.isend(there[after], group=axis.group, group_dst=after), there[after])
    here[axis.rank].copy_(there[axis.rank])
    return messages


class PendingMessages:
    """Messages that bring `out`; a `Pending`.

    They are kept with the axis until they were waited for, also where an error comes in between: gloo forgets a
    message that nobody holds, but not that the other side has one to match it, and so the next would never arrive.
    """

    def __init__(self, out: Tensor, pending: set[Any]) -> None:
        self.out, self.pending = out, pending
        self.works: list[tuple[dist.Work, Tensor]] = []
        pending.add(self)

    def add(self, work: dist.Work | None, tensor: Tensor) -> None:
        """tensor: what is sent, or where it is received; it has to live until then."""
        assert work is not None, "a rank of another group"
        self.works.append((work, tensor))

    def __call__(self) -> Tensor:
        for work, _ in self.works:
            work.wait()
        self.pending.discard(self)
        return self.out
