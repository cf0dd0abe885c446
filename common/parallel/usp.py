"""USP, unified sequence parallelism (Fang and Zhao 2024, arXiv 2405.07719).

Ulysses (all-to-all over heads) inside, ring (keys and values travel) outside.

The three words a model says are `shard`, `attention` and `gather`. With one rank they are identity,
plain attention and identity. Shards are uneven where they must be: n tokens over P ranks are n // P
each, the first n % P get one more, and heads over Ulysses ranks alike. Nothing is padded or masked.

Ulysses: Jacobs et al. 2023 (arXiv 2309.14509). Ring attention: Liu et al. 2023 (arXiv 2310.01889).
The log-sum-exp merge of partial softmaxes: Milakov and Gimelshein 2018 (arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from common.parallel.attention import attention, attention_with_lse, check_kernel, choose_kernel
from common.parallel.mesh import Axis, Mesh
from common.registry.layout import split_evenly


def head_groups(heads: int, ranks: int, groups: int) -> list[tuple[range, ...]]:
    """Which heads of every rank each group takes: ranks share the heads evenly, and a rank's are cut into groups.

    No more groups than the rank with the fewest heads has heads.
    """
    counts = split_evenly(heads, ranks)
    cut = [split_evenly(count, min(groups, counts[-1])) for count in counts]
    starts = [sum(counts[:i]) for i in range(ranks)]
    return [
        tuple(range(start + sum(sizes[:j]), start + sum(sizes[: j + 1])) for start, sizes in zip(starts, cut))
        for j in range(len(cut[0]))
    ]


def exchange(send: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Tensor:
    """All-to-all along dim 0: `sent[i]` rows go to rank i of the axis, `received[i]` rows come from it.

    Returned at once; whoever first reads the result waits for it. The functional form of the
    collective is what lets a compiled graph hold it.
    """
    assert axis.group is not None, "an axis of one rank exchanges nothing"
    return collectives.all_to_all_single(send.contiguous(), list(received), list(sent), axis.group)


class SequenceParallel:
    """Tokens of a sequence over the ring x ulysses ranks of a mesh.

    The rank order along the sequence is ring_rank * ulysses + ulysses_rank.
    kernel: which attention kernel to use, see `common.parallel.attention.KERNELS`; ValueError if it cannot run, or
    (where it is given) not in `dtype`.
    groups: in how many groups of heads the all-to-all is cut, so that one travels while another is attended to.
    """

    def __init__(
        self, mesh: Mesh | None = None, kernel: str = "auto", groups: int = 1, dtype: torch.dtype | None = None
    ) -> None:
        mesh = mesh or Mesh()
        if groups < 1:
            raise ValueError(f"the number of head groups is {groups}; it must be at least 1")
        self.groups = groups
        self.axis, self.ring, self.ulysses = mesh.sequence, mesh.ring, mesh.ulysses
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
        full = exchange(copies, [rows.shape[0]] * self.size, lengths, self.axis)
        return collectives.wait_tensor(full).movedim(0, dim)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Attention of this rank's queries over every rank's keys.

        q, k, v: (B, n, H, D), this rank's tokens of all streams. lengths: every rank's n, in rank order.
        Returns (B, n, H, D). Order of tokens does not matter, so streams may simply be concatenated.
        """
        if self.size == 1:
            return attention(q, k, v, self.kernel)
        assert lengths is not None and lengths[self.rank] == q.shape[1], "lengths must describe q"
        heads = q.shape[2]
        assert heads >= self.ulysses.size, "require_heads was not called"
        u, r = self.ulysses.size, self.ring.rank
        mine, ring = lengths[r * u : (r + 1) * u], [sum(lengths[i * u : (i + 1) * u]) for i in range(self.ring.size)]
        packed = torch.stack((q, k, v), dim=2).transpose(0, 1)  # (n, B, 3, H, D)
        if u == 1:
            return self._ring(q, packed[:, :, 1:], ring)
        groups = head_groups(heads, u, self.groups)
        # All groups set out at once; while one is attended to, the next arrives and the one before goes home.
        under_way = [self._scatter_heads(packed, group, mine) for group in groups]
        home = []
        for group, arriving in zip(groups, under_way):
            shape = (sum(mine), q.shape[0], 3, len(group[self.ulysses.rank]), q.shape[3])
            got = collectives.wait_tensor(arriving).view(shape)
            out = self._ring(got[:, :, 0].transpose(0, 1), got[:, :, 1:], ring)
            home.append(self._return_heads(out, group, mine))
        return self._join_heads(home, groups, q)

    def _scatter_heads(self, packed: Tensor, group: Sequence[range], lengths: Sequence[int]) -> Tensor:
        """Begin to give up other ranks' heads of this rank's tokens for this rank's heads of the Ulysses group's.

        packed: (n, B, 3, H, D). Token-major on the wire, so that what arrives is already one tensor in token order.
        """
        n, batch, _, _, width = packed.shape
        send = torch.cat([packed[:, :, :, part.start : part.stop].reshape(-1) for part in group])
        row, mine = batch * 3 * width, len(group[self.ulysses.rank])
        return exchange(send, [n * len(part) * row for part in group], [m * mine * row for m in lengths], self.ulysses)

    def _return_heads(self, out: Tensor, group: Sequence[range], lengths: Sequence[int]) -> Tensor:
        """Begin the reverse of `_scatter_heads` for the output (B, N, h, D)."""
        batch, _, mine, width = out.shape
        n, row = lengths[self.ulysses.rank], batch * width
        sent, received = [m * mine * row for m in lengths], [n * len(part) * row for part in group]
        return exchange(out.transpose(0, 1).reshape(-1), sent, received, self.ulysses)

    def _join_heads(self, home: Sequence[Tensor], groups: Sequence[Sequence[range]], like: Tensor) -> Tensor:
        """What came home, group by group, as one tensor like q (B, n, H, D)."""
        batch, n, _, width = like.shape
        pieces: dict[int, Tensor] = {}
        for arriving, group in zip(home, groups):
            parts = collectives.wait_tensor(arriving).split([n * len(part) * batch * width for part in group])
            pieces |= {part.start: p.view(n, batch, len(part), width) for p, part in zip(parts, group)}
        return torch.cat([pieces[start] for start in sorted(pieces)], dim=2).transpose(0, 1)

    def _ring(self, q: Tensor, kv: Tensor, lengths: Sequence[int]) -> Tensor:
        """Attention of q (B, N, h, D) over the keys and values of all ring ranks; kv: (N, B, 2, h, D)."""
        size, rank = self.ring.size, self.ring.rank
        if size == 1:
            return attention(q, *_keys_values(kv), self.kernel)
        out: Tensor | None = None
        lse: Tensor | None = None
        for step in range(size):
            # Posted before the attention that hides it.
            following = self._pass_on(kv, lengths[(rank - step - 1) % size]) if step < size - 1 else None
            if lengths[(rank - step) % size]:
                part, part_lse = attention_with_lse(q, *_keys_values(kv), self.kernel)
                out, lse = _merge(out, lse, part, part_lse)
            if following is not None:
                kv = collectives.wait_tensor(following)
        assert out is not None, "a sequence without tokens"
        return out.to(q.dtype)

    def _pass_on(self, kv: Tensor, incoming: int) -> Tensor:
        """Send kv to the next rank of the ring while `incoming` rows come from the one before."""
        size, rank = self.ring.size, self.ring.rank
        sent, received = [0] * size, [0] * size
        sent[(rank + 1) % size], received[(rank - 1) % size] = kv.shape[0], incoming
        return exchange(kv, sent, received, self.ring)


def _keys_values(kv: Tensor) -> tuple[Tensor, Tensor]:
    return kv[:, :, 0].transpose(0, 1), kv[:, :, 1].transpose(0, 1)


def _merge(out: Tensor | None, lse: Tensor | None, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two softmax-normalised partial results (B, N, h, D) by their log-sum-exp (B, h, N), in lse's dtype."""
    part = part.to(part_lse.dtype)
    if out is None or lse is None:
        return part, part_lse
    weight = torch.sigmoid(part_lse - lse).transpose(1, 2).unsqueeze(-1)
    return torch.lerp(out, part, weight), torch.logaddexp(lse, part_lse)
