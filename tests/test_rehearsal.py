"""The CUDA path without a GPU: fake tensors and fake process groups, recorded and checked (tests/rehearsal)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from common.parallel.exchange import exchange
from common.parallel.mesh import Mesh
from common.registry.layout import Layout
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.recorder import agree
from tests.rehearsal.blocks import count_block
from tests.rehearsal.checks import check_devices, check_ends, check_exchanges, check_memory, check_steps
from tests.rehearsal.models import MODELS
from tests.rehearsal.scene import Ran, Scene, run_ranks
from tests.rehearsal.scenes import CAPABILITIES, COVER, LAYOUTS, rehearse
from tests.rehearsal.tracer import Tracer, Unanswered
from tests.rehearsal.traffic import MULTIPLIES, Launch, Traffic

BF16 = {"dtype": torch.bfloat16, "device": "cuda:0"}


def launched(work) -> list[tuple[str, int]]:
    """Operators and bytes of what `work` launches on x (1, 10, 64) and w (64, 64), bf16."""
    with fake_cuda(), torch.inference_mode():
        x, w = torch.empty(1, 10, 64, **BF16), torch.empty(64, 64, **BF16)
        with Traffic() as traffic:
            work(x, w)
    return [(launch.op, launch.bytes) for launch in traffic.launches]


X, W = 10 * 64 * 2, 64 * 64 * 2


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x, w: F.linear(x, w), [("mm", X + W + X)]),
        (lambda x, w: F.linear(x, w, w[0]), [("addmm", X + W + 128 + X)]),
        (lambda x, w: x.transpose(1, 2).flatten(1), [("clone", 2 * X)]),
        (lambda x, w: x.transpose(1, 2)[:, :, None].unbind(0), []),
        (lambda x, w: x.expand(5, -1, -1) + 1, [("add", X + 5 * X)]),
        (lambda x, w: x.mul_(2), [("mul_", 2 * X)]),
        (lambda x, w: x.copy_(w[:10]), [("copy_", 2 * X)]),
        (lambda x, w: torch.zeros_like(x), [("zeros_like", X)]),
        (lambda x, w: x[:, :0] * 2, []),
        (lambda x, w: F.rms_norm(x, (64,), w[0], 1e-5), [("_fused_rms_norm", X + 128 + X + 40)]),
        (lambda x, w: torch.empty(3, 3) + 1, []),
    ],
)
def test_kernels_and_bytes_are_those_of_a_cuda_build(work, expected):
    assert launched(work) == expected


def test_a_norm_that_cannot_be_fused_is_counted_as_what_it_is():
    """PyTorch fuses an RMS norm only where its weight has the input's dtype."""
    assert len(launched(lambda x, w: F.rms_norm(x, (64,), w[0].float(), 1e-5))) > 3


def test_attention_gives_out_memory_as_its_queries_lie():
    def joined(x, w):
        q = x.view(1, 10, 2, 32).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    def copied(x, w):
        q = x.view(1, 10, 2, 32).transpose(1, 2).contiguous()
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    flash = "_scaled_dot_product_flash_attention"
    assert [op for op, _ in launched(joined)] == [flash]
    assert [op for op, _ in launched(copied)] == ["clone", flash, "clone"]


@pytest.mark.parametrize("model", ["mochi", "cogvideox-5b", "consisid", "wan-1.3b"])
def test_a_block_is_counted_apart_from_the_rest_of_its_model(model):
    counted = count_block(model)
    outside = [launch for launch in counted.launches if launch.op in MULTIPLIES]
    assert counted.kernels == int(counted.kernels * 2) / 2 and 20 < counted.kernels < 120
    assert 0 < counted.multiplies < counted.bytes < sum(launch.bytes for launch in counted.launches) / 6
    assert all(isinstance(launch, Launch) and launch.place.endswith(tuple("0123456789")) for launch in outside)


# ---- whole generations


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rehearsal")


@pytest.mark.parametrize("scene", COVER, ids=str)
@pytest.mark.slow
def test_a_generation_runs_on_every_rank(scene, folder):
    """`rehearse` checks it: devices, memory, streams, collectives, waits, what comes back."""
    rehearse(scene, folder)


def test_every_value_of_every_axis_is_covered():
    def values(name: str) -> set[Any]:
        return {getattr(scene, name) for scene in COVER}

    assert values("layout") >= set(LAYOUTS) and values("capability") == set(CAPABILITIES)
    assert values("attention") == {"auto", "sdpa", "cudnn", "flash2", "flash3"}
    assert values("offload") == {"none", "stage", "block", "disk"} and values("shard") == {True, False}
    assert values("dtype") == {"bf16", "fp16", "fp32", "fp8"} and values("video") == {True, False}
    assert values("compiled") == {True, False} and values("groups") == {1, 2}
    assert values("vae") == {"exact", "tiled"} and values("output") == {"frames", "latent"}
    forks = {scene.model.split("-")[0] for scene in COVER if scene.layers is None}
    assert forks == {name.split("-")[0] for name in MODELS}


# ---- what the checks must find


PAIR = Scene("mochi", Layout(ring=2))


def ranks(work: Callable[[Mesh, Tracer], Any]) -> list[Ran]:
    """`work` on both ranks of a ring, as the first sampling step."""

    def step(mesh: Mesh, tracer: Tracer) -> Any:
        tracer.steps.name = "sampling 1"
        return work(mesh, tracer)

    return run_ranks(PAIR, step, {})


def block(mesh: Mesh) -> Tensor:
    return torch.empty(4, 6, device=mesh.device)


def test_a_copy_that_nobody_waits_for_is_a_race():
    def work(mesh: Mesh, tracer: Tracer, waits: bool) -> None:
        stream, x = torch.cuda.Stream(mesh.device), block(mesh)
        host = torch.empty(4, 6, pin_memory=True, device="cpu")
        stream.wait_stream(torch.cuda.current_stream(mesh.device))
        with torch.cuda.stream(stream):
            x.copy_(host, non_blocking=True)
            event = stream.record_event()
        if waits:
            torch.cuda.current_stream(mesh.device).wait_event(event)
        x + 1

    check_memory(PAIR, ranks(lambda mesh, tracer: work(mesh, tracer, True))[0])
    with pytest.raises(AssertionError, match=r"2 races: .*compute reads"):
        check_memory(PAIR, ranks(lambda mesh, tracer: work(mesh, tracer, False))[0])


def test_page_locked_memory_is_not_written_while_a_copy_reads_it():
    def work(mesh: Mesh, tracer: Tracer) -> None:
        host = torch.empty(4, 6, pin_memory=True, device="cpu")
        block(mesh).copy_(host, non_blocking=True)
        host.zero_()

    with pytest.raises(AssertionError, match="host writes"):
        check_memory(PAIR, ranks(work)[0])


def test_a_message_that_is_read_before_it_is_there_is_a_race():
    def work(mesh: Mesh, tracer: Tracer, waits: bool) -> None:
        got, other = block(mesh), 1 - mesh.ring.rank
        sent = dist.isend(block(mesh), group=mesh.ring.group, group_dst=other)
        received = dist.irecv(got, group=mesh.ring.group, group_src=other)
        if waits:
            received.wait()
        got + 1
        sent.wait()

    check_memory(PAIR, ranks(lambda mesh, tracer: work(mesh, tracer, True))[0])
    with pytest.raises(AssertionError, match="1 races"):
        check_memory(PAIR, ranks(lambda mesh, tracer: work(mesh, tracer, False))[0])


def test_memory_that_another_stream_uses_must_not_be_given_back():
    def work(mesh: Mesh, tracer: Tracer) -> None:
        stream, x = torch.cuda.Stream(mesh.device), block(mesh)
        stream.wait_stream(torch.cuda.current_stream(mesh.device))
        with torch.cuda.stream(stream):
            x + 1
        del x

    with pytest.raises(AssertionError, match="is freed while"):
        check_memory(PAIR, ranks(work)[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda mesh: block(mesh).t(), "not contiguous"),
        (lambda mesh: torch.empty(4, 6), "tensors on {'cpu'}"),
    ],
)
def test_what_goes_to_nccl_is_contiguous_and_on_the_gpu(make, said):
    def work(mesh: Mesh, tracer: Tracer) -> None:
        dist.broadcast(make(mesh), group=mesh.weights.group, group_src=0)

    with pytest.raises(AssertionError, match=said):
        check_devices(PAIR, ranks(work)[0])


def test_a_tensor_of_another_gpu_is_found():
    def work(mesh: Mesh, tracer: Tracer) -> None:
        torch.empty(4, device="cuda:5") + 1

    with pytest.raises(AssertionError, match="cuda:5"):
        check_devices(PAIR, ranks(work)[0])


def test_a_wait_of_the_host_inside_a_step_is_found():
    with pytest.raises(Unanswered, match="the host reads a number in"):
        ranks(lambda mesh, tracer: block(mesh).sum().item())
    with pytest.raises(AssertionError, match="the host waits in"):
        check_steps(PAIR, ranks(lambda mesh, tracer: torch.cuda.synchronize())[0])
    with pytest.raises(AssertionError, match="a copy to cpu in"):
        check_steps(PAIR, ranks(lambda mesh, tracer: block(mesh).cpu())[0])


def test_ranks_that_expect_other_rows_are_found():
    def work(mesh: Mesh, tracer: Tracer) -> None:
        rows = [[1, 3], [2, 2]][mesh.ring.rank]
        exchange(block(mesh), rows, rows, mesh.ring)

    with pytest.raises(AssertionError, match="the others expect"):
        check_exchanges(ranks(work))


def test_two_ranks_that_wait_for_each_other_are_found():
    """NCCL's messages between two ranks pass one after the other: both receive first, and nobody sends."""

    def work(mesh: Mesh, tracer: Tracer, first: int) -> None:
        group, other = mesh.ring.group, 1 - mesh.ring.rank
        for way in (0, 1) if mesh.ring.rank == first else (1, 0):
            if way:
                dist.send(block(mesh), group=group, group_dst=other)
            else:
                dist.recv(block(mesh), group=group, group_src=other)

    check_ends(ranks(lambda mesh, tracer: work(mesh, tracer, 0)))
    stuck = ranks(lambda mesh, tracer: work(mesh, tracer, mesh.ring.rank))
    agree([one.record for one in stuck])
    check_exchanges(stuck)
    with pytest.raises(AssertionError, match="never happen"):
        check_ends(stuck)


def test_groups_that_are_entered_in_other_orders_hang():
    """Each group's own order is the same on both ranks, and the host waits between them."""

    def work(mesh: Mesh, tracer: Tracer) -> None:
        groups = [mesh.ring.group, mesh.weights.group]
        for group in groups if mesh.ring.rank else reversed(groups):
            dist.broadcast(block(mesh), group=group, group_src=0)
            torch.cuda.synchronize()

    with pytest.raises(AssertionError, match="hosts wait for ever"):
        check_ends(ranks(work))


def test_a_block_that_is_not_prefetched_is_found(folder):
    """With an odd number of blocks the first waits for the last: one fetch in so many has nothing to hide behind."""
    scene = Scene("cogvideox-2b", offload="block", output="latent", layers=3)
    rehearse(replace(scene, layers=4), folder)
    with pytest.raises(AssertionError, match="are hidden"):
        rehearse(scene, folder)


def test_batches_wait_for_both_ends_of_each_message_and_for_no_order_of_them():
    """A batch is one launch: either rank may name its messages in any order, but batches pass one after the other."""

    def work(mesh: Mesh, tracer: Tracer, sends: list[int]) -> None:
        other, group = 1 - mesh.ring.rank, mesh.world.group
        for only in sends:
            messages = [
                dist.P2POp(dist.isend, block(mesh), group=group, tag=0, group_peer=other),
                dist.P2POp(dist.irecv, block(mesh), group=group, tag=0, group_peer=other),
            ]
            for one in dist.batch_isend_irecv(messages[:: 1 - 2 * mesh.ring.rank] if only < 0 else [messages[only]]):
                one.wait()

    check_ends(ranks(lambda mesh, tracer: work(mesh, tracer, [-1, -1])))
    check_ends(ranks(lambda mesh, tracer: work(mesh, tracer, [mesh.ring.rank, -1])))
    stuck = ranks(lambda mesh, tracer: work(mesh, tracer, [0, 1]))
    check_exchanges(stuck)
    with pytest.raises(AssertionError, match="never happen"):
        check_ends(stuck)
