"""Compiled blocks: whole regions around attention, nothing compiled twice, exchanges under way while attention runs,
the eager picture; on ranks and with streamed weights.

The graphs are run by a backend that counts them and leaves the arithmetic to PyTorch's own kernels; one test, marked
slow, runs generated code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from cogvideox_xdit import CogVideoXPipeline
from common.model.compile import compile_transformer
from common.parallel.mesh import Layout, distributed
from common.parallel.usp import SequenceParallel
from common.registry.settings import CompileOptions, DecodeOptions
from consisid_xdit import ConsisIDPipeline
from consisid_xdit.face import IdentityFeatures
from mochi_xdit import MochiPipeline
from mochi_xdit.weights import load_transformer
from tests.helpers import cogvideox, consisid, mochi, wan
from tests.helpers.exchanges import told_exchanges
from wan_xdit import WanPipeline

PROMPTS = ("a red ball", "a blue box moves to the left and a red ball to the right", "a", "")
SIZE = {"height": 48, "width": 80, "num_steps": 2, "output": "latent"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    return mochi.write_checkpoint(tmp_path_factory.mktemp("mochi"), "native")


def counting(backend: str = "aot_eager") -> tuple[CompileCounterWithBackend, CompileOptions]:
    """backend: `eager` runs dynamo's graphs as they are, in half the time."""
    counter = CompileCounterWithBackend(backend)
    return counter, CompileOptions(compile=True, backend=counter)


def identity(config: Any) -> IdentityFeatures:
    given = consisid.identity(config)
    picture = torch.full((64, 96, 3), 90, dtype=torch.uint8)
    return IdentityFeatures(given["id_cond"], tuple(given["id_vit_hidden"]), picture, torch.zeros(5, 2))


def write(kind: str, folder: Path) -> Path:
    """A small checkpoint of the fork."""
    if kind == "mochi":
        return mochi.write_checkpoint(folder, "native")
    if kind == "wan":
        return wan.write_checkpoint(folder, "t2v-a14b")
    return cogvideox.write_checkpoint(folder, "5b") if kind == "cogvideox" else consisid.write_checkpoint(folder)


def makes(kind: str, folder: Path, sampling: Mapping[str, Any] = SIZE, **options: Any):
    """A function from prompt to latents."""
    options = {"dtype": "fp32"} | options
    if kind == "mochi":
        pipe = MochiPipeline.from_pretrained(folder, **options)
        return lambda prompt: pipe(prompt, num_frames=7, **sampling)
    if kind == "cogvideox":
        pipe = CogVideoXPipeline.from_pretrained(folder, **options)
        return lambda prompt: pipe(prompt, num_frames=9, **sampling)
    if kind == "wan":
        pipe = WanPipeline.from_pretrained(folder, **options)
        return lambda prompt: pipe(prompt, num_frames=9, **{**sampling, "num_steps": 4})
    pipe = ConsisIDPipeline.from_pretrained(folder, **options)
    person = identity(pipe.config)
    return lambda prompt: pipe(prompt, identity=person, num_frames=9, **{**sampling, "height": 64, "width": 96})


@pytest.mark.parametrize("kind", ["mochi", "cogvideox", "consisid", "wan"])
@pytest.mark.slow
def test_one_generation_compiles_all_there_is(kind, tmp_path):
    counter, options = counting()
    folder = write(kind, tmp_path)
    made, eager = makes(kind, folder, keep_loaded=True, compiling=options), makes(kind, folder)
    torch.testing.assert_close(made(PROMPTS[0]), eager(PROMPTS[0]), atol=1e-5, rtol=1e-5)
    graphs = counter.frame_count
    # Before attention, the heads, their output, after it: one graph each, of which dynamo may trace two twice. Mochi:
    # the last block is another one for all but the heads, and the empty prompt of guidance has no text tokens, so 2 x 7
    # and those traced twice. Wan: five, of which it may trace two twice; its two experts share them.
    assert 4 <= graphs <= {"mochi": 16, "wan": 7}.get(kind, 6)
    for prompt in PROMPTS[1:]:
        torch.testing.assert_close(made(prompt), eager(prompt), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == graphs, "recompiled for another prompt"
    assert not counters["graph_break"]


@pytest.mark.slow
def test_without_dynamic_sizes_each_length_is_compiled_anew(native):
    counter, options = counting()
    static = replace(options, compile_dynamic=False)
    pipe = MochiPipeline.from_pretrained(native, dtype="fp32", keep_loaded=True, compiling=static)
    pipe(PROMPTS[0], num_frames=7, **SIZE)
    before = counter.frame_count
    pipe(PROMPTS[1], num_frames=7, **SIZE)
    assert counter.frame_count > before


def on_ranks(
    kind: str,
    folder: Path,
    layout: Layout,
    options: dict[str, Any],
    backend: str,
    sampling: Mapping[str, Any] = SIZE,
) -> tuple[Tensor, int, int]:
    """Latents of a second prompt, graphs of the first, and how many more the second needed."""
    torch._dynamo.reset()
    counters.clear()
    counter, compiling = counting(backend)
    with distributed(layout) as mesh:
        made = makes(kind, folder, sampling, mesh=mesh, keep_loaded=True, compiling=compiling, **options)
        made(PROMPTS[0])
        first = counter.frame_count
        latents = made(PROMPTS[1])
        assert not counters["graph_break"]
        return latents, first, counter.frame_count - first


@pytest.mark.parametrize(
    ("kind", "layout", "options", "backend"),
    [
        ("mochi", Layout(ring=2), {"offload": "disk"}, "eager"),
        ("cogvideox", Layout(cfg=2, ulysses=2), {"shard_weights": True, "overlap_groups": 2}, "eager"),
        ("cogvideox", Layout(ulysses=3), {}, "aot_eager"),
        pytest.param("consisid", Layout(ring=2, ulysses=2), {"offload": "block"}, "eager", marks=pytest.mark.long),
        ("wan", Layout(ring=3), {"overlap_groups": 2, "interleave_branches": True}, "eager"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_ranks_compile_once_too(run_ranks, tmp_path, kind, layout, options, backend):
    folder = write(kind, tmp_path)
    eager = makes(kind, folder)(PROMPTS[1])
    for latents, first, more in run_ranks(layout.ranks, on_ranks, kind, folder, layout, options, backend):
        torch.testing.assert_close(latents, eager, atol=1e-5, rtol=1e-4)
        assert first > 0 and more == 0


ISSUED = {
    "ring": "post",
    "ulysses": "post",
    "wait": "wait",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attend",
}


def order_of_issue(folder: Path, layout: Layout, groups: int, compiled: bool) -> tuple[str, int]:
    """The order in which one block posts exchanges, waits for them and attends, and how many graphs it has."""
    torch._dynamo.reset()
    counter, compiling = counting("eager")
    with distributed(layout) as mesh, torch.inference_mode():
        model = load_transformer(folder, SequenceParallel(mesh, groups=groups), dtype=torch.float32)
        if compiled:
            compile_transformer(model, compiling)
        text = torch.randn(1, 5, mochi.TINY.text_dim, generator=torch.Generator().manual_seed(0))
        cond = model.prepare((2, 6, 10), text)
        x = model.sp.shard(torch.randn(1, 30, mochi.TINY.hidden_x, generator=torch.Generator().manual_seed(1)))
        block, c = model.blocks[0], torch.ones(1, mochi.TINY.hidden_x)
        block(x, cond.y, c, cond)
        # Of the run, not of the trace: what a graph holds was issued when it was made, too.
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
            told_exchanges(mesh, mark),
        ):
            block(x, cond.y, c, cond)
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return " ".join(ISSUED[event.name] for event in events if event.name in ISSUED), counter.frame_count


def mark(name: str) -> None:
    """So that the profile has it."""
    with torch.profiler.record_function(name):
        pass


@pytest.mark.parametrize(
    ("layout", "groups", "order", "traced"),
    [
        # One more graph where keys leave before queries are made; where the first heads are not all, two more.
        (Layout(ring=2), 1, "post attend wait attend", 5),
        (Layout(ring=2), 2, "post post attend attend wait attend wait attend", 7),
        (Layout(ulysses=2), 2, "post post wait attend post wait attend post wait wait", 6),
        (
            Layout(ring=2, ulysses=2),
            2,
            "post post wait post attend wait wait post attend post attend wait attend post wait wait",
            6,
        ),
    ],
    ids=str,
)
def test_exchanges_are_posted_before_the_attention_they_hide_behind(run_ranks, native, layout, groups, order, traced):
    """Compiled as not compiled: a graph that held the exchanges would wait for each at once."""
    for compiled in (False, True):
        for found, graphs in run_ranks(layout.ranks, order_of_issue, native, layout, groups, compiled):
            assert (found, graphs) == (order, traced if compiled else 0)


@pytest.mark.parametrize(
    ("kind", "layout", "offload", "backend"),
    [
        ("mochi", Layout(ring=2), "block", "eager"),
        ("cogvideox", Layout(), "disk", "aot_eager"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_float8_weights_are_compiled_too(run_ranks, tmp_path, kind, layout, offload, backend):
    """Within bf16's rounding, in which these are computed; without guidance, whose branch has graphs of its own."""
    folder, one = write(kind, tmp_path), SIZE | {"cfg_scale": 1.0}
    eager = makes(kind, folder, one, dtype="fp8")(PROMPTS[1])
    options = {"dtype": "fp8", "offload": offload}
    for latents, first, more in run_ranks(layout.ranks, on_ranks, kind, folder, layout, options, backend, one):
        assert (latents - eager).norm() < 0.02 * eager.norm()
        assert first > 0 and more == 0


@pytest.mark.slow
def test_the_decoder(native):
    counter = CompileCounterWithBackend("aot_eager")
    latents = torch.randn(1, mochi.TINY.channels, 5, 6, 10, generator=torch.Generator().manual_seed(0))
    shown = CompileOptions(compile_vae=True, backend=counter)
    got = MochiPipeline.from_pretrained(native, dtype="fp32", compiling=shown).decode(
        latents, DecodeOptions(vae_chunk=2)
    )
    want = MochiPipeline.from_pretrained(native, dtype="fp32").decode(latents, DecodeOptions(vae_chunk=2))
    assert counter.frame_count > 0
    assert (got.int() - want.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["cogvideox", pytest.param("mochi", marks=pytest.mark.long)])
@pytest.mark.slow
def test_generated_code_gives_the_eager_latents(kind, tmp_path):
    folder, one = write(kind, tmp_path), SIZE | {"num_steps": 1, "cfg_scale": 1.0}
    compiled, eager = (
        makes(kind, folder, one, compiling=CompileOptions(compile=compile))(PROMPTS[0]) for compile in (True, False)
    )
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["fast", "reduce-overhead", "max-autotune"])
def test_a_mode_that_is_not_offered_is_refused(mode):
    with pytest.raises(ValueError, match="choose one of default, max-autotune-no-cudagraphs"):
        CompileOptions(compile_mode=mode)
