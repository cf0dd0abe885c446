"""The order in which attention posts its exchanges and waits for them, whichever way they go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

import common.parallel.usp
from common.parallel.exchange import Pending, exchange
from common.parallel.mesh import Axis, Mesh


@contextmanager
def told_exchanges(mesh: Mesh, tell: Callable[[str], None]) -> Iterator[None]:
    """Within it `tell` hears each exchange's axis, `ring`, `ulysses` or `sequence`, as it is posted, and `wait`."""
    axes = {"sequence": mesh.sequence, "ring": mesh.ring, "ulysses": mesh.ulysses}
    names = {axis.group.group_name: name for name, axis in axes.items() if axis.group is not None}

    def telling(send: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Pending:
        assert axis.group is not None
        tell(names[axis.group.group_name])
        arriving = exchange(send, sent, received, axis)

        def wait() -> Tensor:
            tell("wait")
            return arriving()

        return wait

    with mock.patch.object(common.parallel.usp, "exchange", telling):
        yield
