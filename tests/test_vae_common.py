"""Streams, their links over ranks, tiles and decode plans, on a small causal network that is no model."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.decode import (
    AMPLE,
    MARGIN,
    SPARE,
    DecodePlan,
    PeakMemory,
    VideoDecoder,
    agree,
    decode_frames,
    decode_memory,
    decode_plans,
    plan_decode,
    plan_for_all,
    probe,
    to_uint8,
)
from common.parallel import Axis, Layout, distributed, edges
from common.tiles import cut, tiles
from common.vae import CausalConv3d, CausalStream, LocalLink, TimeSplit, encode_moments, lay_out, spans


class Net(VideoDecoder):
    """Causal convolutions that double rows and columns and keep the number of frames."""

    scale = 2
    chunk_choices = (3, 2, 1)

    def __init__(self, layers: int = 4, kernel: int = 3, mode: str = "replicate", channels: int = 3) -> None:
        super().__init__()
        sizes = [2] + [channels] * (layers - 1) + [3]
        self.layers = nn.ModuleList(CausalConv3d(a, b, (kernel, 3, 3), mode) for a, b in pairwise(sizes))

    def chunks(self, latents: int, chunk: int) -> list[int]:
        whole, rest = divmod(latents, chunk)
        return [chunk] * whole + [rest] * (rest > 0)

    def frames(self, latents: int, first: bool) -> int:
        return latents

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        stream = stream or CausalStream()
        x = z.repeat_interleave(2, 3).repeat_interleave(2, 4)
        for layer in self.layers:
            x = torch.tanh(layer(x, stream))
        return x


def net(dtype: torch.dtype = torch.float64, **numbers) -> Net:
    torch.manual_seed(0)
    return Net(**numbers).to(dtype)


def latents(frames: int, height: int = 3, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(1, 2, frames, height, width, generator=generator, dtype=torch.float64)


def stream_through(model: nn.Module, z: Tensor, lengths: list[int], link) -> Tensor:
    parts = spans(lengths)
    last = len(parts) - 1
    return torch.cat([model(z[:, :, p], CausalStream(link, k == 0, k == last)) for k, p in enumerate(parts)], 2)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("lengths", [[1], [1] * 7, [7], [2, 1, 1, 3], [1, 6], [6, 1]])
def test_streaming_equals_the_whole(kernel, lengths):
    model, z = net(kernel=kernel), latents(sum(lengths))
    link = LocalLink()
    assert torch.allclose(model(z), stream_through(model, z, lengths, link), rtol=0, atol=1e-12)
    assert not any(link.kept.values()), "tails were left behind"


def test_the_first_frame_is_repeated_before_the_video():
    x = latents(3)
    extended = CausalStream().extend("key", x, 2)
    assert torch.equal(extended, torch.cat([x[:, :, :1], x[:, :, :1], x], 2))
    assert torch.equal(CausalStream().skip(x, 1), x[:, :, 1:])
    assert torch.equal(CausalStream(first=False).skip(x, 1), x)


def test_causal_convolution_never_looks_ahead_and_pads_space_as_told():
    x = latents(5)
    for mode in ("zeros", "replicate"):
        conv = CausalConv3d(2, 3, 3, mode).double()
        plain = nn.Conv3d(2, 3, 3, padding=(0, 1, 1), padding_mode=mode).double()
        plain.load_state_dict(conv.state_dict())
        padded = torch.cat([x[:, :, :1]] * 2 + [x], 2)
        assert torch.allclose(conv(x, CausalStream()), plain(padded), rtol=0, atol=1e-14)
        changed = x.clone()
        changed[:, :, 3:] += 1
        assert torch.equal(conv(x, CausalStream())[:, :, :3], conv(changed, CausalStream())[:, :, :3])


class Operations(TorchDispatchMode):
    """Writes down the names of operations and the elements that copies write."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.copied = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if self.names[-1] in ("copy_", "clone", "cat", "pad", "replication_pad3d"):
            self.copied += out.numel()
        return out


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_a_convolutions_input_is_written_once(mode):
    conv, x, link = CausalConv3d(2, 3, 3, mode).double(), torch.randn(1, 2, 4, 30, 40).double(), LocalLink()
    with torch.inference_mode():
        conv(x, CausalStream(link, last=False))
        with Operations() as done:
            conv(x, CausalStream(link, first=False))
    assert not {"cat", "pad", "replication_pad3d"} & set(done.names)
    border = 2 * 6 * (30 * 42 + 2 * 40 + 4 - 30 * 40) if mode == "replicate" else 0
    assert 2 * 6 * 30 * 40 + border <= done.copied <= 2 * 6 * 30 * 40 + 1.1 * border


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_a_convolution_trains_as_one_that_pads_by_itself(mode):
    conv, x = CausalConv3d(2, 3, 3, mode).double(), latents(4).requires_grad_()
    plain = nn.Conv3d(2, 3, 3, padding=(0, 1, 1), padding_mode=mode).double()
    plain.load_state_dict(conv.state_dict())
    ours, theirs = conv(x, CausalStream()), plain(torch.cat([x[:, :, :1]] * 2 + [x], 2))
    weights = torch.randn_like(ours)
    found = torch.autograd.grad((ours * weights).sum(), (x, *conv.parameters()))
    expected = torch.autograd.grad((theirs * weights).sum(), (x, *plain.parameters()))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, expected))


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_a_gpus_memory_order_changes_no_frame(monkeypatch, mode):
    model, z, seen = net(mode=mode, channels=4), latents(5), []
    expected = stream_through(model, z, [2, 3], LocalLink())
    convolve = torch.nn.functional.conv3d
    monkeypatch.setattr("torch.nn.functional.conv3d", lambda x, *rest: seen.append(x) or convolve(x, *rest))
    assert lay_out(model, torch.device("cpu")).layers[0].weight.is_contiguous()
    assert torch.equal(stream_through(model, z, [2, 3], LocalLink()), expected)
    assert all(x.is_contiguous() for x in seen)
    seen.clear()
    lay_out(model, torch.device("cuda"))
    assert torch.allclose(stream_through(model, z, [2, 3], LocalLink()), expected, rtol=0, atol=1e-12)
    assert len(seen) == 8 and all(x.is_contiguous(memory_format=torch.channels_last_3d) for x in seen)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_large_convolutions_go_in_stretches_of_time(monkeypatch, mode, stride):
    conv = CausalConv3d(2, 3, (3, 3, 3), mode, stride=(stride, 1, 1)).double()
    x = latents(9)
    whole = conv(x, CausalStream())
    for frames in (1, 4, 5, 100):
        monkeypatch.setattr("common.vae.LARGEST_CONVOLUTION", frames * x[:, :, 0].numel())
        assert torch.allclose(conv(x, CausalStream()), whole, rtol=0, atol=1e-14)
    assert whole.shape[2] == 9 // stride + 9 % stride


def test_a_whole_video_trains_and_keeps_no_tails():
    model, z = net(), latents(4).requires_grad_()
    model(z).square().sum().backward()
    assert z.grad is not None and all(p.grad.abs().sum() > 0 for p in model.parameters())


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

    def receive(self, key, x, frames):
        self.log.append("receive")
        return self.link.receive(key, x, frames)

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
        return encode_moments(net(), latents(sum(lengths)), lengths, TimeSplit(mesh.world))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("lengths", [[1], [3, 1, 2, 2]])
def test_encoding_over_ranks_is_whole_on_every_rank(run_ranks, ranks, lengths):
    whole = net()(latents(sum(lengths))).detach()
    for ours in run_ranks(ranks, moments, ranks, lengths):
        assert torch.allclose(ours, whole, rtol=0, atol=1e-12)
    assert torch.allclose(encode_moments(net(), latents(sum(lengths)), lengths, TimeSplit()), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 7, 13, 16, 17, 25, 60, 61, 106, 211])
@pytest.mark.parametrize("limit, overlap", [(4, 8), (6, 2), (12, 8), (16, 8), (24, 7), (30, 0), (300, 8)])
def test_cuts_cover_every_length_and_weigh_one(length, limit, overlap):
    found = cut(length, limit, overlap)
    total, covered = torch.zeros(8 * length, dtype=torch.float64), torch.zeros(8 * length)
    for span in found:
        assert 0 <= span.start < span.stop <= length and span.stop - span.start <= limit
        pixels = span.scaled(8)
        total[pixels.slice] += pixels.weight(torch.float64, torch.device("cpu"))
        covered[pixels.slice] += 1
    assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12)
    assert covered.min() >= 1 and covered.max() <= 2
    if length <= limit:
        assert len(found) == 1


def test_blending_the_cut_picture_gives_the_picture():
    picture = torch.randn(3, 2, 26, 38, dtype=torch.float64)
    canvas = torch.zeros_like(picture)
    parts = tiles(13, 19, (7, 8), 2)
    for part in parts:
        rows, columns = part.rows.scaled(2), part.columns.scaled(2)
        part.blend(canvas, picture[..., rows.slice, columns.slice], 2)
    assert len(parts) == 9 and torch.allclose(canvas, picture, rtol=0, atol=1e-12)


def tiled(ranks: int, size: tuple[int, int], plan: DecodePlan) -> Tensor:
    mesh = distributed(Layout(ulysses=ranks))
    frames = list(decode_frames(net(), latents(5, *size), plan, TimeSplit(mesh.world)))
    return torch.cat(frames) if mesh.is_main else torch.empty(0)


SIZES = [(3, 5), (8, 8), (9, 16), (17, 7), (23, 31)]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_have_the_right_size_and_are_close(size):
    exact = torch.cat(list(decode_frames(net(), latents(5, *size)))).float()
    plan = DecodePlan("tiled", 2, (8, 8), 2)
    ours = torch.cat(list(decode_frames(net(), latents(5, *size), plan))).float()
    assert ours.shape == exact.shape == (5, 2 * size[0], 2 * size[1], 3)
    # Four 3x3 layers reach 4 pixels over a seam of 4: only there may it differ.
    assert (ours - exact).abs().mean() < 2
    assert (ours == exact).float().mean() > 0.4
    alone = torch.cat(list(decode_frames(net(), latents(5, *size), DecodePlan("tiled", 2, (40, 40)))))
    assert torch.equal(alone.float(), exact)


@pytest.mark.parametrize("ranks, size", [(2, (9, 16)), (3, (23, 31)), (5, (9, 8))])
def test_tiles_dealt_over_ranks_are_the_same_to_the_bit(run_ranks, ranks, size):
    plan = DecodePlan("tiled", 2, (8, 8), 2)
    alone = torch.cat(list(decode_frames(net(), latents(5, *size), plan)))
    assert torch.equal(run_ranks(ranks, tiled, ranks, size, plan)[0], alone)


def test_pixels_become_bytes_by_the_named_rule():
    grey = torch.tensor([-2.0, -1.0, 0.0, 0.9999, 1.0, 3.0]).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    assert to_uint8(grey)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(grey, "nearest")[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(grey.bfloat16())[0, 0, :, 0].tolist() == [0, 0, 127, 255, 255, 255]


class Overflowing(Net):
    """One pixel of the video's frame `at` is what it should never be."""

    def __init__(self, value: float, at: int) -> None:
        super().__init__()
        self.value, self.at, self.seen = value, at, 0

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        pixels = super().forward(z, stream)
        if 0 <= self.at - self.seen < pixels.shape[2]:
            pixels[0, 1, self.at - self.seen, 2, 3] = self.value
        self.seen += pixels.shape[2]
        return pixels


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("plan", [DecodePlan("exact", 2), DecodePlan("tiled", 2, (9, 9))])
@pytest.mark.parametrize("at, named", [(0, "frames 0 to 1"), (3, "frames 2 to 3"), (4, "frame 4;")])
def test_frames_that_are_not_finite_are_never_shown(value, plan, at, named):
    shown = []
    with pytest.raises(FloatingPointError, match=f"the decoder made NaN or infinity in {named}"):
        shown.extend(decode_frames(Overflowing(value, at).double(), latents(5), plan))
    assert sum(len(frames) for frames in shown) == at // 2 * 2


@pytest.mark.parametrize("plan", [DecodePlan(), DecodePlan("tiled", 1, (8, 8), 2)])
def test_a_resting_decode_leaves_its_caller_alone(plan):
    pieces = decode_frames(net(), latents(3, 9, 9), plan)
    next(pieces)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_only_one_video_is_decoded_at_a_time():
    with pytest.raises(ValueError, match="one video"):
        next(decode_frames(net(), torch.zeros(2, 2, 1, 3, 3)))


def test_peak_memory_counts_what_lives_at_once():
    there_before = torch.zeros(5000)
    with PeakMemory() as counter:
        a = torch.zeros(1000)
        assert there_before.view(50, 100)[:3].shape == (3, 100)
        b = a.view(10, 100) + 1
        del a
        c = b * 2
        del b
        gc.collect()
    assert (counter.now, counter.peak) == (4000, 8000)
    assert c.sum() == 2000


def test_memory_of_a_long_video_is_that_of_two_chunks():
    model, z = net(channels=8), latents(12, 9, 8)
    peaks = {}
    for frames in (4, 8, 12):
        gc.collect()
        with PeakMemory("cpu") as counter:
            for _ in decode_frames(model, z[:, :, :frames], DecodePlan("exact", 2)):
                pass
        peaks[frames] = counter.peak
    assert peaks[12] == peaks[8] <= peaks[4] * 1.2
    estimate = decode_memory(model, (2, 12, 9, 8), DecodePlan("exact", 2))
    assert 0.8 < estimate / peaks[12] < 1.2


def test_plans_go_from_the_fastest_to_the_smallest():
    model, shape = net(channels=8), (2, 12, 40, 64)
    plans = decode_plans(model, shape)
    assert [(p.mode, p.chunk) for p in plans[:4]] == [("exact", 3), ("exact", 2), ("exact", 1), ("tiled", 1)]
    needs = [decode_memory(model.to("meta"), shape, plan) for plan in plans]
    assert needs == sorted(needs, reverse=True) and needs[-1] < needs[2] / 4
    for i, need in enumerate(needs):
        assert plan_decode(model, shape, need * MARGIN + SPARE, plans) == plans[i:]
    assert plan_decode(model, shape, 0, plans) == plans[-1:]
    assert decode_plans(model, shape, ranks=8)[0].chunk == 2
    assert decode_plans(model, (2, 1, 40, 64))[0].chunk == 1
    assert {p.mode for p in decode_plans(model, shape, mode="exact")} == {"exact"}
    assert decode_plans(model, shape, mode="tiled", tile=(20, 20), chunk=5) == (DecodePlan("tiled", 5, (20, 20)),)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mode": "fast"}, "auto, exact or tiled"),
        ({"chunk": 0}, "at least 1"),
        ({"tile": (2, 9)}, "at least 4x4"),
        ({"mode": "exact", "tile": (9, 9)}, "does not cut"),
    ],
)
def test_plans_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        decode_plans(net(), (2, 4, 8, 8), **wrong)


class Rigid(Net):
    """A model of which the chunks are a part."""

    chunk_choices = (2,)
    chunks_fixed = True


def test_fixed_chunks_stay():
    assert {p.chunk for p in decode_plans(Rigid(), (2, 12, 40, 64), ranks=12)} == {2}
    assert decode_plans(Rigid(), (2, 12, 40, 64), chunk=2)[0].chunk == 2
    with pytest.raises(ValueError, match="only 2 is possible"):
        decode_plans(Rigid(), (2, 12, 40, 64), chunk=3)


class Starved(Net):
    """Runs out of memory above a picture size."""

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        if z.shape[-1] > 30:
            raise torch.OutOfMemoryError("too wide")
        return super().forward(z, stream)


def agreed(ranks: int, hungry_rank: int) -> str:
    mesh = distributed(Layout(ulysses=ranks))
    shape = (2, 4, 20, 40)
    model = Starved() if mesh.world.rank == hungry_rank else Net()
    plans = decode_plans(model, shape, ranks=mesh.world.size)
    return str(agree(plans, lambda plan: probe(model, shape, plan), mesh.world, mesh.device))


def tried(ranks: int) -> list[tuple[str, int]]:
    """The plan for all, and how often the decoder ran to find it: short of memory twice, then with plenty."""
    mesh = distributed(Layout(ulysses=ranks))
    shape, runs, agreed, found = (2, 6, 20, 40), [], {}, []
    model = Starved() if mesh.world.rank == 1 else Net()
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    plans = decode_plans(model, shape, ranks)
    count = cache(lambda plan: decode_memory(Net(), shape, plan, "cpu", ranks))
    need = count(plans[0])
    for free in (need * MARGIN + SPARE, need * MARGIN + SPARE, need * AMPLE + SPARE):
        runs.clear()
        plan = plan_for_all(model, shape, plans, free, count, mesh.world, mesh.device, agreed)
        found.append((plan.mode, len(runs)))
    return found


def test_a_plan_is_tried_out_once_and_only_where_memory_is_short(run_ranks):
    for first, again, ample in run_ranks(2, tried, 2):
        assert first[0] == "tiled" and first[1] >= 4
        assert again == ("tiled", 0) and ample == ("exact", 0)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("GET was unable to find an engine to execute this")],
)
def test_a_probe_sees_memory_run_out_whoever_says_it(monkeypatch, error):
    given_back = []
    monkeypatch.setattr("common.decode.release_memory", lambda: given_back.append(1))
    model = net(torch.float32)
    assert probe(model, (2, 4, 3, 5), DecodePlan()) and len(given_back) == 1
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
    assert not probe(model, (2, 4, 3, 5), DecodePlan()) and len(given_back) == 2
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("a defect")), prepend=True)
    with pytest.raises(RuntimeError, match="a defect"):
        probe(model, (2, 4, 3, 5), DecodePlan())


def test_tails_that_arrive_from_another_rank_are_counted():
    model, shape, plan = net(channels=8), (2, 12, 9, 8), DecodePlan("exact", 2)
    tails = 8 * 2 * (2 + 3 * 8) * 18 * 16  # two frames before each layer of 2 and 8 channels
    alone = decode_memory(model, shape, plan)
    assert decode_memory(model, shape, plan, ranks=2) == alone + tails
    tiles = DecodePlan("tiled", 2, (8, 8))
    assert decode_memory(model, shape, tiles, "cuda", ranks=2) == decode_memory(model, shape, tiles, "cuda")


def test_ranks_agree_on_a_plan_that_fits_them_all(run_ranks):
    roomy = run_ranks(2, agreed, 2, -1)
    assert roomy[0] == roomy[1] == "exact, 2 latent frames at a time"
    tight = run_ranks(2, agreed, 2, 1)
    assert tight[0] == tight[1] and tight[0].startswith("tiled")
    with pytest.raises(MemoryError, match="smallest"):
        agree((DecodePlan(),), lambda plan: False, Axis(), torch.device("cpu"))
