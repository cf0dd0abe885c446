"""USP, unified sequence parallelism (Fang and Zhao 2024, arXiv 2405.07719).

Ulysses (all-to-all over heads) inside, ring (keys and values travel) outside.

The three words a model says are `shard`, `attend` (or the plain `attention`) and `gather`. With one rank they are
identity, attention between its projections, and identity. Shards are uneven where they must be: n tokens over P ranks
are n // P each, the first n % P get one more, and heads over Ulysses ranks alike. Nothing is padded or masked.

Ulysses: Jacobs et al. 2023 (arXiv 2309.14509). Ring attention: Liu et al. 2023 (arXiv 2310.01889).
The log-sum-exp merge of partial softmaxes: Milakov and Gimelshein 2018 (arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from common.parallel.attention import attention, attention_with_lse, check_kernel, choose_kernel
from common.parallel.exchange import Pending, exchange
from common.parallel.mesh import Mesh
from common.registry.layout import head_groups, split_evenly, turns_ahead

A = TypeVar("A")
R = TypeVar("R")
T = TypeVar("T")
Project = Callable[[slice, str], tuple[Tensor, ...]]
"""(heads, parts) -> those of "qkv" that `parts` names, of these heads of this rank's tokens, each (B, n, h, D)."""
Output = Callable[[Tensor, slice, T | None], T]
"""(out, heads, sum) -> sum + what the output projection makes of `out` (B, n, h, D), the columns of these heads; the
first time there is no sum yet."""


class SequenceParallel:
    """Tokens of a sequence over the ring x ulysses ranks of a mesh.

    The rank order along the sequence is ring_rank * ulysses + ulysses_rank.
    kernel: which attention kernel to use, see `common.parallel.attention.KERNELS`; ValueError if it cannot run, or
    (where it is given) not in `dtype`.
    groups: in how many groups of heads all exchanges are cut, so that one travels while another is attended to.
    """

    def __init__(
        self, mesh: Mesh | None = None, kernel: str = "auto", groups: int = 1, dtype: torch.dtype | None = None
    ) -> None:
        mesh = mesh or Mesh()
        if groups < 1:
            raise ValueError(f"the number of head groups is {groups}; it must be at least 1")
        self.groups = groups
        self.axis, self.ring, self.ulysses = mesh.sequence, mesh.ring, mesh.ulysses
        self.interleaver = mesh.interleaver
        self.device, self.kernel = mesh.device, choose_kernel(kernel, mesh.device, dtype)

    @property
    def size(self) -> int:
        return self.axis.size

    @property
    def rank(self) -> int:
        return self.axis.rank

    def require_heads(self, heads: int, head_dim: int | None = None) -> None:
        """Raise ValueError when there are more Ulysses ranks than heads, or the kernel does not take their width."""
        check_kernel(self.kernel.name, self.device, head_dim=head_dim)
        if self.ulysses.size > heads:
            raise ValueError(
                f"ulysses degree {self.ulysses.size} is more than the model's {heads} attention heads; "
                f"use at most {heads} and put the rest into the ring degree"
            )

    def lengths(self, n: int) -> tuple[int, ...]:
        """How many of a stream's n tokens each rank holds."""
        return split_evenly(n, self.size)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of the full `x`: a view, `lengths(x.shape[dim])[rank]` long along `dim`."""
        if self.size == 1:
            return x
        lengths = self.lengths(x.shape[dim])
        return x.narrow(dim, sum(lengths[: self.rank]), lengths[self.rank])

    def gather(self, x: Tensor, lengths: Sequence[int], dim: int = 1) -> Tensor:
        """The full tensor on every rank; `lengths[i]` is what rank i holds along `dim`."""
        if self.size == 1:
            return x
        rows = x.movedim(dim, 0)
        copies = rows.expand(self.size, *rows.shape).flatten(0, 1)
        wait = exchange(copies, [rows.shape[0]] * self.size, lengths, self.axis)
        return wait().movedim(0, dim)

    @property
    def each(self) -> Callable[[Callable[[A], R], Iterable[A]], Iterable[R]]:
        """`map`, for what does not depend on each other: in turn where the mesh says so, see `Interleaver.map`."""
        if self.interleaver is None:
            return map
        return partial(self.interleaver.map, ahead=turns_ahead(self.ring.size, self.ulysses.size, self.groups))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Attention of this rank's queries over every rank's keys: `attend` of heads that are there already.

        q, k, v: (B, n, H, D), this rank's tokens of all streams. lengths: every rank's n, in rank order.
        Returns (B, n, H, D). Order of tokens does not matter, so streams may simply be concatenated.
        """
        if self.size == 1:
            return attention(q, k, v, self.kernel)
        assert lengths is not None and lengths[self.rank] == q.shape[1], "lengths must describe q"
        groups = self.attend(partial(_take, {"q": q, "k": k, "v": v}), _collect, q.shape[2], lengths)
        return groups[0] if len(groups) == 1 else torch.cat(groups, dim=2)

    def attend(self, project: Project, output: Output[T], heads: int, lengths: Sequence[int] | None = None) -> T:
        """From what makes q, k and v to the projected output, with exchanges under whatever does not depend on them.

        project, output: see `Project` and `Output`. heads: of the model. lengths: every rank's tokens, in rank order.
        On one rank each is called once, for all heads, around plain attention. Each group of heads leaves as soon as it
        is made, so that it travels under the projection of the next ones. Over a ring keys and values leave before the
        queries are made. Between Ulysses ranks the next group arrives and the one before goes home while a group is
        attended to, and what came home is projected while the last one is on its way.
        """
        whole = slice(0, heads)
        if self.size == 1:
            q, k, v = project(whole, "qkv")
            del project  # what it holds is needed no more
            return output(attention(q, k, v, self.kernel), whole, None)
        assert lengths is not None and heads >= self.ulysses.size, "no lengths, or require_heads was not called"
        groups = head_groups(heads, self.ulysses.size, self.groups)
        spans = [slice(group[0].start, group[-1].stop) for group in groups]
        if self.ulysses.size > 1:
            return self._attend_groups(project, output, groups, spans, lengths)
        rings = [_Ring(self, _pack(project(span, "kv")), lengths) for span in spans]
        (q,) = project(whole, "q")
        del project
        return self._attend_rings(q, output, rings, spans)

    def _attend_rings(self, q: Tensor, output: Output[T], rings: Sequence[_Ring], spans: Sequence[slice]) -> T:
        total: T | None = None
        for ring, span in zip(rings, spans):
            ring.attend(q[:, :, span])
        for hop in range(1, self.ring.size):
            self.pass_turn()
            for ring, span in zip(rings, spans):
                ring.arrive()
                if hop < self.ring.size - 1:
                    ring.attend(q[:, :, span])
                else:
                    total = output(ring.last(q[:, :, span]), span, total)
        assert total is not None
        return total

    def _attend_groups(
        self,
        project: Project,
        output: Output[T],
        groups: Sequence[Sequence[range]],
        spans: Sequence[slice],
        lengths: Sequence[int],
    ) -> T:
        u, r = self.ulysses.size, self.ring.rank
        mine, ring = lengths[r * u : (r + 1) * u], [sum(lengths[i * u : (i + 1) * u]) for i in range(self.ring.size)]
        pending = []
        for i, (group, span) in enumerate(zip(groups, spans)):
            if i == 1:
                self.pass_turn()  # the other's attention needs what travels meanwhile, and its output goes next
            qkv = project(span, "qkv")
            pending.append(self._scatter_heads(qkv, group, mine))
            batch, n, _, width = qkv[0].shape
            del qkv
        del project

        def arrive(i: int) -> tuple[Tensor, _Ring]:
            inputs = pending.pop(0)().view(sum(mine), batch, 3, len(groups[i][self.ulysses.rank]), width)
            return inputs[:, :, 0].transpose(0, 1), _Ring(self, inputs[:, :, 1:], ring)

        outputs, count = [], len(groups)
        self.pass_turn()
        q, round_trip = arrive(0)
        for i, group in enumerate(groups):
            round_trip.go_round(q)
            # Its keys and values set out round the ring under the last attention of this group.
            next_inputs = arrive(i + 1) if i + 1 < count and self.ring.size > 1 else None
            outputs.append(self._return_heads(round_trip.last(q), group, mine))
            if i + 1 < count:
                q, round_trip = next_inputs or arrive(i + 1)
        total: T | None = None
        self.pass_turn()
        for group, span, wait in zip(groups, spans, outputs):
            total = output(self._join_heads(wait, group, (batch, n, width)), span, total)
        assert total is not None
        return total

    def pass_turn(self) -> None:
        """Who takes turns with another lets it compute now."""
        if self.interleaver is not None:
            self.interleaver.pass_turn()

    def _scatter_heads(self, qkv: Sequence[Tensor], group: Sequence[range], lengths: Sequence[int]) -> Pending:
        """Begin to give up other ranks' heads of this rank's tokens for this rank's heads of the Ulysses group's.

        qkv: q, k and v (B, n, h, D) of the group's heads. Token-major on the wire, (n, B, 3, h, D) for each rank, so
        that what arrives is already one tensor in token order.
        """
        batch, n, heads, width = qkv[0].shape
        row, mine, at = batch * 3 * width, len(group[self.ulysses.rank]), 0
        send = qkv[0].new_empty(n * heads * row)
        # Ranks with as many heads each at once: two runs of them at most, and each number is copied once.
        for each, parts in groupby(len(part) for part in group):
            ranks = sum(1 for _ in parts)
            count = ranks * each
            wire = send.narrow(0, n * at * row, n * count * row).view(ranks, n, batch, 3, each, width)
            for i, x in enumerate(qkv):
                wire[:, :, :, i] = x[:, :, at : at + count].unflatten(2, (ranks, each)).permute(2, 1, 0, 3, 4)
            at += count
        return exchange(send, [n * len(part) * row for part in group], [m * mine * row for m in lengths], self.ulysses)

    def _return_heads(self, out: Tensor, group: Sequence[range], lengths: Sequence[int]) -> Pending:
        """Begin the reverse of `_scatter_heads` for the output (B, N, h, D)."""
        batch, _, mine, width = out.shape
        n, row = lengths[self.ulysses.rank], batch * width
        sent, received = [m * mine * row for m in lengths], [n * len(part) * row for part in group]
        return exchange(out.transpose(0, 1).reshape(-1), sent, received, self.ulysses)

    def _join_heads(self, wait: Pending, group: Sequence[range], shape: tuple[int, int, int]) -> Tensor:
        """A group that comes home, as one tensor (B, n, h, D); shape: its B, n and D."""
        batch, n, width = shape
        parts = wait().split([n * len(part) * batch * width for part in group])
        return torch.cat([p.view(n, batch, len(part), width) for p, part in zip(parts, group)], dim=2).transpose(0, 1)


class _Ring:
    """Keys and values on their way round the ring, from the moment that this rank's own are there.

    kv: (N, B, 2, h, D) of this rank, which leave at once. lengths: every ring rank's N.
    """

    def __init__(self, sp: SequenceParallel, kv: Tensor, lengths: Sequence[int]) -> None:
        self.sp, self.kv, self.lengths, self.step = sp, kv, lengths, 0
        self.out: Tensor | None = None
        self.lse: Tensor | None = None
        self.pending = self._pass_on()

    def go_round(self, q: Tensor) -> None:
        """Attention of q (B, N, h, D) over all keys but the last to come, which are waited for."""
        while self.pending is not None:
            self.attend(q)
            self.sp.pass_turn()
            self.arrive()

    def arrive(self) -> None:
        """Wait for the next keys and values, and send them on."""
        assert self.pending is not None, "all have been here"
        self.kv = self.pending()
        self.step += 1
        self.pending = self._pass_on()

    def last(self, q: Tensor) -> Tensor:
        """Attention over those too, and the result (B, N, h, D)."""
        if len(self.lengths) == 1:
            return attention(q, *_keys_values(self.kv), self.sp.kernel)
        self.attend(q, last=True)
        assert self.out is not None, "a sequence without tokens"
        return self.out.to(q.dtype)

    def attend(self, q: Tensor, last: bool = False) -> None:
        """Attention over what is here. last: nothing comes after it."""
        if self.lengths[(self.sp.ring.rank - self.step) % len(self.lengths)]:
            part, part_lse = attention_with_lse(q, *_keys_values(self.kv), self.sp.kernel)
            if self.out is None or self.lse is None:
                self.out, self.lse = part, part_lse
            else:
                self.out = _merge(self.out, part, torch.sigmoid(part_lse - self.lse), last)
                self.lse = None if last else torch.logaddexp(self.lse, part_lse)

    def _pass_on(self) -> Pending | None:
        """Send what is here to the next rank of the ring while the one before sends its own, unless all have come."""
        size, rank = len(self.lengths), self.sp.ring.rank
        if self.step == size - 1:
            return None
        sent, received = [0] * size, [0] * size
        sent[(rank + 1) % size] = self.kv.shape[0]
        received[(rank - 1) % size] = self.lengths[(rank - self.step - 1) % size]
        return exchange(self.kv, sent, received, self.sp.ring)


def _pack(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B, n, h, D) as one, token-major: (n, B, parts, h, D)."""
    return torch.stack([part.transpose(0, 1) for part in parts], dim=2)


def _take(qkv: Mapping[str, Tensor], heads: slice, parts: str) -> tuple[Tensor, ...]:
    return tuple(qkv[part][:, :, heads] for part in parts)


def _collect(out: Tensor, heads: slice, groups: list[Tensor] | None) -> list[Tensor]:
    return [*(groups or []), out]


def _keys_values(kv: Tensor) -> tuple[Tensor, Tensor]:
    return kv[:, :, 0].transpose(0, 1), kv[:, :, 1].transpose(0, 1)


def _merge(out: Tensor, part: Tensor, weight: Tensor, last: bool) -> Tensor:
    """Two softmax-normalised partial results (B, N, h, D) as one, in the dtype of the weight (B, h, N) of `part`.

    last: in the dtype of `part` instead, rounded once. `out` may be overwritten.
    """
    weight = weight.transpose(1, 2).unsqueeze(-1)
    if torch.is_grad_enabled():
        return torch.addcmul(out * (1 - weight), part, weight).to(part.dtype if last else weight.dtype)
    out = torch.mul(out, 1 - weight, out=out if out.dtype == weight.dtype else None)
    return torch.addcmul(out, part, weight, out=torch.empty_like(part) if last else out)
