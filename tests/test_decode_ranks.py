"""The links of a stream over ranks: chunks dealt to them give the same frames, and no rank waits for another."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from common.parallel.mesh import Layout, distributed, edges
from common.video.causal import CausalStream, TimeSplit, encode_moments
from common.video.decode import DecodePlan, decode_frames, to_uint8
from tests.helpers.causal_net import latents, net


def dealt(ranks: int, cases: list[tuple[int, int, int]]) -> list[Tensor]:
    """Frames of every case on rank 0, nothing elsewhere, with one split for all of them."""
    mesh = distributed(Layout(ulysses=ranks))
    split, results = TimeSplit(mesh.world), []
    for frames, chunk, kernel in cases:
        pieces = list(decode_frames(net(kernel=kernel), latents(frames), DecodePlan("exact", chunk), split))
        assert all((piece is None) == (mesh.world.rank > 0) for piece in pieces)
        results.append(torch.cat(pieces) if mesh.is_main else torch.empty(0))
    return results


CASES = [(1, 1, 3), (2, 1, 3), (9, 1, 3), (9, 2, 3), (11, 3, 2), (10, 1, 5), (4, 9, 3)]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_chunks_dealt_over_ranks_give_the_same_frames(run_ranks, ranks):
    expected = [to_uint8(net(kernel=kernel)(latents(frames))[0].detach()) for frames, _, kernel in CASES]
    for ours, whole in zip(run_ranks(ranks, dealt, ranks, CASES)[0], expected):
        assert ours.dtype == torch.uint8 and torch.equal(ours, whole)


def dealt_on_a_part(frames: int, chunk: int) -> Tensor:
    """Two axes of two ranks in a world of four, each decoding its own video."""
    mesh = distributed(Layout(cfg=2, ulysses=2))
    z = latents(frames + mesh.cfg.rank)
    split = TimeSplit(replace(mesh.ulysses, edges=edges([[0, 1], [2, 3]], mesh.device)))
    pieces = list(decode_frames(net(), z, DecodePlan("exact", chunk), split))
    return torch.cat(pieces) if mesh.ulysses.rank == 0 else torch.empty(0)


def test_an_axis_that_is_not_the_world(run_ranks):
    results = run_ranks(4, dealt_on_a_part, 7, 2)
    for first, frames in ((0, 7), (2, 8)):
        assert torch.equal(results[first], to_uint8(net()(latents(frames))[0].detach()))


class Recorded:
    """A link that writes down what passes."""

    def __init__(self, link, log: list[str]) -> None:
        self.link, self.log = link, log

    def send(self, key, tail):
        self.log.append("send")
        self.link.send(key, tail)

    def receive(self, key, x, size):
        self.log.append("receive")
        return self.link.receive(key, x, size)

    def close(self):
        self.link.close()


class RecordedSplit(TimeSplit):
    log: list[str]

    def link(self):
        return Recorded(super().link(), self.log)


LAYERS = 6


def order_of_events(ranks: int, frames: int, chunk: int) -> list[str]:
    mesh = distributed(Layout(ulysses=ranks))
    split, model = RecordedSplit(mesh.world), net(layers=LAYERS)
    split.log = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: split.log.append("computed"))
    list(decode_frames(model, latents(frames), DecodePlan("exact", chunk), split))
    return split.log


def replay(logs: list[list[str]], chunks: int) -> tuple[list[int], int]:
    """When each chunk is done if a layer takes one unit and messages none, and the units all ranks worked."""
    clocks, logs, sent, done, worked = [0] * len(logs), [list(log) for log in logs], {}, [], 0
    for k in range(chunks):
        log, clock, arrived, left, computed = logs[k % len(logs)], clocks[k % len(logs)], 0, 0, 0
        while computed < LAYERS:
            event = log.pop(0)
            if event == "receive":
                clock, arrived = max(clock, sent[k - 1, arrived]), arrived + 1
            elif event == "send":
                sent[k, left], left = clock, left + 1
            else:
                clock, computed, worked = clock + 1, computed + 1, worked + 1
        clocks[k % len(logs)] = clock
        done.append(clock)
    assert not any(logs)
    return done, worked


@pytest.mark.parametrize("ranks, frames, chunk", [(2, 12, 2), (3, 12, 2), (3, 12, 1), (5, 10, 1)])
def test_no_rank_waits_for_a_whole_chunk_of_another(run_ranks, ranks, frames, chunk):
    chunks = -(-frames // chunk)
    logs = run_ranks(ranks, order_of_events, ranks, frames, chunk)
    done, worked = replay(logs, chunks)
    assert worked == chunks * LAYERS
    # Chunk k follows chunk k - 1 at most one layer behind, so that all ranks work at once:
    # rounds x layers, and one layer for every rank until the wave is under way.
    assert all(later - earlier <= 1 for k, (earlier, later) in enumerate(pairwise(done)) if (k + 1) % ranks)
    assert done[-1] <= -(-chunks // ranks) * LAYERS + ranks - 1
    assert done[-1] < worked / 2 + LAYERS


def buffers(ranks: int, frames: int) -> tuple[int, int]:
    """How many memories tails are sent from, and received into, over a whole video."""
    mesh = distributed(Layout(ulysses=ranks))
    split, sent, received = TimeSplit(mesh.world), [], []
    link = split.link()
    send, receive = dist.isend, dist.irecv

    def sending(tensor: Tensor, **more):
        sent.append(tensor)
        return send(tensor, **more)

    def receiving(tensor: Tensor, **more):
        received.append(tensor)
        return receive(tensor, **more)

    with mock.patch.object(dist, "isend", sending), mock.patch.object(dist, "irecv", receiving), torch.no_grad():
        model, z = net(layers=LAYERS), latents(frames)
        for k in range(mesh.world.rank, frames, ranks):
            model(z[:, :, k : k + 1], CausalStream(link, k == 0, k == frames - 1))
        link.close()
    return tuple(len({tensor.data_ptr() for tensor in tensors}) for tensors in (sent, received))


def test_tails_travel_in_one_buffer_a_layer(run_ranks):
    """The lists keep every tensor alive, so that an address counts once only if it is the same memory."""
    assert run_ranks(2, buffers, 2, 9) == [(LAYERS, LAYERS)] * 2


def moments(ranks: int, lengths: list[int]) -> Tensor:
    mesh = distributed(Layout(ulysses=ranks))
    with torch.no_grad():
        return encode_moments(net(), latents(sum(lengths)), lengths, TimeSplit(mesh.world), 1)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("lengths", [[1], [3, 1, 2, 2]])
def test_encoding_over_ranks_is_whole_on_every_rank(run_ranks, ranks, lengths):
    whole = net()(latents(sum(lengths))).detach()
    for ours in run_ranks(ranks, moments, ranks, lengths):
        assert torch.allclose(ours, whole, rtol=0, atol=1e-12)
    assert torch.allclose(
        encode_moments(net(), latents(sum(lengths)), lengths, TimeSplit(), 1), whole, rtol=0, atol=1e-12
    )
