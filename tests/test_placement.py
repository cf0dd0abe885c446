"""Weights that are not all on the device: blocks from host memory, from files, in shares, in eight bits."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from common.parallel.mesh import Layout, Mesh, distributed
from common.parallel.usp import SequenceParallel
from common.video.decode_planning import PeakMemory
from common.weights import blocks
from common.weights.blocks import BlockLayout, Blocks, FromFile, FromHost, FromShares, Stream, bind, finish, streamed
from common.weights.float8 import (
    FLOAT8,
    LARGEST,
    Float8Linear,
    fill_float8,
    has_float8_matmul,
    scaled_matmul,
    to_float8,
    use_float8,
)
from common.weights.load import CheckpointError, load, on_meta, open_checkpoint, save
from common.weights.placement import Placement, place, resident_bytes
from mochi_xdit.transformer import MochiTransformer
from mochi_xdit.weights import find_transformer, load_transformer
from tests.helpers.mochi import TINY, denoise, write_checkpoint

CPU, GPU_3 = torch.device("cpu"), torch.device("cuda", 3)


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("native"), "native")


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("diffusers"), "diffusers")


def denoised(folder: Path, placement: Placement, mesh: Mesh | None = None, dtype=torch.float32, rounds=2) -> Tensor:
    """The same prediction several times over, which has to be the same each time."""
    mesh = mesh or Mesh()
    sp = SequenceParallel(mesh)
    model = load_transformer(folder, sp, "cpu", dtype, placement=placement, world=mesh.world)
    given = torch.Generator().manual_seed(1)
    latents = torch.randn(1, TINY.channels, 2, 6, 10, generator=given)
    text = torch.randn(1, 7, TINY.text_dim, generator=given)
    out = [denoise(model, latents, torch.tensor([300.0]), text) for _ in range(rounds)]
    assert all(torch.equal(again, out[0]) for again in out)
    return out[0]


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("offload", ["none", "block", "disk"])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_where_weights_are_changes_nothing(layout, offload, float8, request):
    folder = request.getfixturevalue(layout)
    want = denoised(folder, Placement(float8=float8))
    assert torch.equal(denoised(folder, Placement(offload, float8=float8)), want)


def test_sharding_on_one_rank_keeps_the_blocks_whole(native):
    assert torch.equal(denoised(native, Placement(shard=True)), denoised(native, Placement()))


def on_ranks(folder: Path, layout: Layout, placement: Placement) -> tuple[Tensor, int]:
    with distributed(layout) as mesh:
        out = denoised(folder, placement, mesh)
        model = load_transformer(folder, SequenceParallel(mesh), placement=placement, world=mesh.world)
        return out, resident_bytes(model)


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(
    ("layout", "placement"),
    [
        (Layout(ulysses=2), Placement(shard=True)),
        (Layout(ring=3), Placement("block", shard=True)),
        (Layout(cfg=2, ring=2), Placement("none", shard=True)),
        (Layout(ring=2), Placement("disk")),
        (Layout(ulysses=2), Placement("block")),
    ],
    ids=str,
)
def test_shares_and_layouts(run_ranks, native, layout, placement, float8):
    placement = Placement(placement.offload, placement.shard, float8)
    want = denoised(native, Placement(float8=float8))
    for got, _ in run_ranks(layout.ranks, on_ranks, native, layout, placement):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_memory_falls_with_the_ranks(run_ranks, tmp_path):
    """Outer layers + blocks / P + two buffers, to the byte of the padding."""
    model, file = small_blocks(), tmp_path / "many.safetensors"
    save(model.state_dict(), file)
    one = sum(t.numel() * 4 for t in model.blocks[0].state_dict().values())
    outer = sum(t.numel() * 4 for t in model.outer.state_dict().values())
    for ranks in (2, 4, 8):
        for got in run_ranks(ranks, shared_bytes, file, ranks):
            # The padding: 256 bytes for each tensor and each share.
            assert 0 <= got - (outer + len(model.blocks) * one / ranks + 2 * one) <= 40 * 256 + 8 * 2048


class Stacked(nn.Module):
    """A model in the form that `place` takes; every block has another width of hidden layer."""

    matmuls = ("up", "down", "missing.layer")

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        self.sp = SequenceParallel()
        self.outer = nn.Linear(8, 32)
        self.blocks = Blocks(nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)}) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.outer(x)
        for block in streamed(self.blocks):
            x = x + block["down"](torch.tanh(block["up"](x)))
        return x


def small_blocks(count: int = 8) -> Stacked:
    torch.manual_seed(count)
    return Stacked(count).requires_grad_(False)


def shared_bytes(file: Path, ranks: int) -> int:
    with distributed(Layout(ring=ranks)) as mesh:
        model = place(on_meta(Stacked), open_checkpoint(file), placement=Placement(shard=True), world=mesh.world)
        x, whole = torch.ones(2, 8), load(on_meta(Stacked), open_checkpoint(file))
        assert torch.equal(model(x), whole(x))
        return resident_bytes(model)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("offload", ["block", "disk"])
def test_any_number_of_blocks(tmp_path, count, offload):
    model, file = small_blocks(count), tmp_path / "m.safetensors"
    save(model.state_dict(), file)
    moving = place(on_meta(Stacked, count), open_checkpoint(file), placement=Placement(offload))
    x = torch.randn(3, 8)
    for _ in range(3):
        assert torch.equal(moving(x), model(x))
    assert list(moving.state_dict()) == list(model.state_dict())


def test_a_loop_that_was_left_early_does_not_spoil_the_next(tmp_path):
    model, file = small_blocks(4), tmp_path / "m.safetensors"
    save(model.state_dict(), file)
    moving = place(on_meta(Stacked, 4), open_checkpoint(file), placement=Placement("disk"))
    for i, _ in enumerate(streamed(moving.blocks)):
        if i == 1:
            break
    x = torch.randn(3, 8)
    assert torch.equal(moving(x), model(x))


class Recorder:
    """A source that notes what it is asked for; `arrived` says what the device has been promised."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def fetch(self, index: int, out: Tensor):
        self.events.append(f"fetch {index}")
        return lambda: self.events.append(f"wait {index}")


@pytest.mark.parametrize(
    ("count", "again", "expected"),
    [
        (4, True, "f0 w0 f1 b0 w1 f2 b1 w2 f3 b2 w3 f0 b3 | w0 f1 b0 w1 f2 b1 w2 f3 b2 w3 f0 b3"),
        # An odd number: the last block and the first share a buffer, and the second is still in the other.
        (3, True, "f0 w0 f1 b0 w1 f2 b1 w2 b2 | f0 w0 b0 f2 b1 w2 b2"),
        (2, False, "f0 w0 f1 b0 w1 b1 | b0 b1"),
        (1, True, "f0 w0 b0 | b0"),
    ],
)
def test_each_block_is_asked_for_one_ahead(count, again, expected):
    blocks, source = Blocks(nn.Linear(2, 2) for _ in range(count)), Recorder()
    layouts = [BlockLayout.of(block, lambda name: torch.float32) for block in blocks]
    blocks.stream = Stream(source, layouts, CPU, layouts[0].nbytes, again)
    for turn in range(2):
        for i, _ in enumerate(streamed(blocks)):
            source.events.append(f"block {i}")
        if not turn:
            source.events.append("|")
    short = " ".join(e if e == "|" else f"{e[0]}{e.split()[1]}" for e in source.events)
    assert short == expected


def test_combinations_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="nothing to shard"):
        Placement("disk", shard=True)
    with pytest.raises(ValueError, match="choose one of none, stage, block, disk"):
        Placement("cpu")


class Locks:
    """Stands for CUDA's registration of host memory: which addresses are locked now, and for how many bytes."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        pages = {at // 4096 for start, size in self.locked.items() for at in range(start, start + size, 4096)}
        assert address % 4096 == 0 and address // 4096 not in pages, "a page may be registered once"
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def locks(monkeypatch) -> Locks:
    """A CUDA that registers memory and copies at once."""
    found = Locks()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "check_error", lambda status: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    copies = blocks._Copies(CPU)
    monkeypatch.setattr(blocks, "_Copies", lambda device: copies)
    return found


def test_pinned_blocks_are_unlocked_when_their_model_leaves(locks):
    parts = [torch.arange(n, dtype=torch.uint8) for n in (100, 7, 200)]
    host = FromHost(torch.device("cuda", 1))
    for part in parts:
        host.add(part)
    assert sorted(locks.locked.values()) == [7, 100, 200], "what is locked is what was asked for"
    out = torch.zeros(200, dtype=torch.uint8)
    for i, part in enumerate(parts):
        host.fetch(i, out)()
        assert torch.equal(out[: part.numel()], part)
    model = nn.Module()
    model.blocks = Blocks()
    model.blocks.stream = Stream(host, [BlockLayout({}, 200)] * 3, CPU, 200, wrap_around=True)
    finish(model)
    assert not locks.locked


def test_pinned_blocks_are_unlocked_when_they_are_only_dropped(locks):
    host = FromHost(torch.device("cuda", 1))
    host.add(torch.ones(5000, dtype=torch.uint8))
    assert locks.locked
    del host
    gc.collect()
    assert not locks.locked


def test_the_reading_thread_works_on_its_ranks_gpu(monkeypatch):
    """A thread begins on GPU 0, and would open a context there."""
    found = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append((device, threading.get_ident())))
    copies = blocks._Copies(CPU)
    monkeypatch.setattr(blocks, "_Copies", lambda device: copies)
    source = FromFile(lambda index, tensors: found.append((None, threading.get_ident())), [BlockLayout({}, 8)], GPU_3)
    source.fetch(0, torch.empty(8, dtype=torch.uint8))()
    (device, starter), (_, reader) = found
    assert device == GPU_3 and starter == reader != threading.get_ident()


# Eight bits


def test_scales_are_powers_of_two_and_nothing_overflows():
    x = torch.randn(64, 33) * torch.logspace(-12, 12, 64)[:, None]
    x[5] = 0
    x[6] = LARGEST  # exactly representable: its scale is one
    values, scale = to_float8(x)
    mantissa, _ = torch.frexp(scale)
    assert torch.equal(mantissa, torch.full_like(scale, 0.5))
    assert scale[6].item() == 1.0 and torch.equal(values[6].float(), x[6])
    wide = values.float() * scale
    assert torch.isfinite(wide).all() and not wide[5].any()
    # Four bits of precision: half a step is 1/16 of a number's own power of two, but for the smallest of a row.
    peak = x.abs().amax(1, keepdim=True)
    assert bool(((wide - x).abs() <= torch.maximum(x.abs() / 16, peak * 2**-17)).all())
    assert torch.equal((values.to(torch.bfloat16) * scale.to(torch.bfloat16)).float(), wide), "exact in bf16"


def test_rounding_by_pieces_is_rounding_at_once():
    weight = torch.randn(5000, 1000)
    values, scale = torch.empty(weight.shape, dtype=FLOAT8), torch.empty(5000, 1)
    fill_float8(weight, values, scale)
    whole, scales = to_float8(weight)
    assert torch.equal(values.view(torch.uint8), whole.view(torch.uint8)) and torch.equal(scale, scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("elements", [70, 1 << 26])
def test_rounding_without_widening_is_rounding_in_fp32(dtype, elements):
    """bf16 is divided as it is: by a power of two, which loses nothing."""
    x = (torch.randn(64, 33) * torch.logspace(-6, 4, 64)[:, None]).to(dtype)
    values, scale = to_float8(x.view(8, 8, 33), elements)
    assert values.shape == (8, 8, 33) and scale.shape == (8, 8, 1)
    want = (x.float() / scale.view(64, 1)).to(FLOAT8)
    assert torch.equal(values.view(torch.uint8).view(64, 33), want.view(torch.uint8))
    compiled, scales = torch.compile(to_float8, backend="eager", fullgraph=True)(x)
    assert torch.equal(compiled.view(torch.uint8), want.view(torch.uint8)) and torch.equal(scales, scale.view(64, 1))


def test_what_a_gpu_holds_to_multiply_in_eight_bits_is_counted():
    """The rounded inputs and one piece on its way, not two fp32 copies; and not the widened weight of other devices."""
    tokens, inputs, outputs = 1 << 16, 4096, 1024
    x = torch.empty(1, tokens, inputs, dtype=torch.bfloat16, device="meta")
    peaks = {}
    for multiplies in (False, True):
        layer = Float8Linear(inputs, outputs, bias=False, device="meta", multiplies=multiplies)
        with torch.inference_mode(), PeakMemory() as memory:
            assert layer(x).shape == (1, tokens, outputs)
        peaks[multiplies] = memory.peak
    # 2^26 elements on their way: a quarter of them all, in bf16.
    rounded, piece, product = tokens * inputs, (1 << 26) * 2, tokens * outputs * 2
    assert rounded + max(piece, product) <= peaks[True] <= (rounded + max(piece, product)) * 1.01
    assert peaks[False] < peaks[True], "what the estimate for a GPU counted before"


def test_sums_are_not_asked_to_be_kept_in_fewer_bits(monkeypatch):
    asked = {}

    def multiply(a, *_, **options):
        asked.update(options)
        return torch.zeros(a.shape[0], 32, dtype=torch.bfloat16)

    module = ModuleType("torchao.float8.inference")
    module.addmm_float8_unwrapped_inference = multiply
    for name in ("torchao", "torchao.float8"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchao.float8.inference", module)
    layer = Float8Linear(64, 32, bias=False, multiplies=True)
    fill_float8(torch.randn(32, 64), layer.weight, layer.weight_scale)
    assert layer(torch.randn(2, 7, 64).to(torch.bfloat16)).shape == (2, 7, 32)
    assert asked["use_fast_accum"] is False


@pytest.mark.parametrize("bias", [False, True])
def test_a_float8_layer_computes_with_its_rounded_weights(bias):
    linear, module = nn.Linear(48, 32, bias=bias), nn.Sequential(nn.Linear(1, 1))
    module[0] = linear
    use_float8(module, ["0", "1.missing"])
    layer = module[0]
    assert isinstance(layer, Float8Linear)
    fill_float8(linear.weight.detach(), layer.weight, layer.weight_scale)
    if bias:
        layer.bias.copy_(linear.bias)
    linear.weight.data = layer.weight.float() * layer.weight_scale
    x = torch.randn(2, 5, 48)
    assert torch.equal(layer(x), linear(x))
    assert layer(x[:, :0]).shape == (2, 0, 32)


def test_the_matmul_of_the_fast_path():
    """torchao's fp8 product runs on the CPU too: the arithmetic that a GPU would do, against the wide product."""
    pytest.importorskip("torchao")
    layer = Float8Linear(64, 48, bias=True)
    fill_float8(torch.randn(48, 64), layer.weight, layer.weight_scale)
    layer.bias = nn.Parameter(torch.randn(48, dtype=torch.bfloat16), requires_grad=False)
    x = torch.randn(2, 7, 64).to(torch.bfloat16)
    values, scale = to_float8(x)
    rounded = values.float() * scale
    want = nn.functional.linear(rounded, layer.weight.float() * layer.weight_scale, layer.bias.float())
    got = scaled_matmul(x, layer.weight, layer.weight_scale, layer.bias)
    torch.testing.assert_close(got.float(), want, atol=0.05, rtol=0.01)
    error = (layer(x).float() - want).norm() / want.norm()
    assert 0 < error < 0.05, "rounded activations are another, close result"


def test_the_cpu_widens():
    assert not has_float8_matmul(CPU)


def float8_state(folder: Path) -> MochiTransformer:
    return load_transformer(folder, dtype=torch.bfloat16, placement=Placement(float8=True))


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("offload", ["stage", "block", "disk"])
def test_a_saved_float8_checkpoint_is_what_loading_would_have_made(request, tmp_path, layout, offload):
    folder = request.getfixturevalue(layout)
    part, made = find_transformer(folder), float8_state(folder)
    file = tmp_path / "dit.safetensors"
    save(made.state_dict(), file, rename=part.rename)
    again = place(
        on_meta(MochiTransformer, part.config), open_checkpoint(file), part.rename, placement=Placement(offload)
    )
    if offload != "stage":  # block 0 is what was fetched first
        next(streamed(again.blocks))
    for name, tensor in again.blocks[0].state_dict().items():
        want = made.blocks[0].state_dict()[name]
        assert tensor.dtype == want.dtype and torch.equal(tensor.view(torch.uint8), want.view(torch.uint8)), name
    assert again.blocks[0].mod_x.weight.dtype == torch.bfloat16 and again.blocks[0].attn.qkv_x.weight.dtype == FLOAT8


def test_float8_files_load_strictly(tmp_path, native):
    state = float8_state(native).state_dict()
    file = tmp_path / "dit.safetensors"
    save({k: v for k, v in state.items() if k != "blocks.1.attn.qkv_x.weight_scale"}, file)
    with pytest.raises(CheckpointError, match=r"missing tensor blocks\.1\.attn\.qkv_x\.weight_scale"):
        place(on_meta(MochiTransformer, TINY), open_checkpoint(file))
    save(state | {"blocks.0.attn.qkv_x.weight_zero": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="unexpected tensor"):
        place(on_meta(MochiTransformer, TINY), open_checkpoint(file))
    save(state, file)
    with pytest.raises(CheckpointError, match="has dtype F8_E4M3, expected"):
        load(on_meta(MochiTransformer, TINY), open_checkpoint(file))


def test_shares_are_padded_apart():
    """The bytes of a share are a whole number of alignments, and the shares together hold the block."""
    for nbytes in (1, 255, 256, 257, 4096, 99_999):
        for ranks in (1, 2, 3, 7):
            share = FromShares.share_bytes(nbytes, ranks)
            assert share % 256 == 0 and nbytes <= share * ranks < nbytes + ranks * 256 + 1


def test_host_memory_takes_large_blocks():
    block = nn.Linear(3000, 9000, bias=False).requires_grad_(False)  # 108 MB
    layout = BlockLayout.of(block, lambda name: torch.float32)
    source, memory = FromHost(CPU), torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.views(memory)["weight"].copy_(block.weight)
    source.add(memory)
    assert source.parts[0].numel() == layout.nbytes
    stream = Stream(source, [layout], CPU, layout.nbytes, wrap_around=True)
    other = nn.Linear(3000, 9000, bias=False, device="meta")
    bind(other, stream.views(0))
    next(iter(stream.visit([other], 1)))
    assert torch.equal(other.weight, block.weight)
