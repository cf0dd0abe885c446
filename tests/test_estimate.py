"""Memory told in advance: against what processes really take, against what is loaded, and what is chosen by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cogvideox_xdit.demo import demo_config as cogvideox_config
from cogvideox_xdit.demo import demo_vae
from cogvideox_xdit.demo import random_checkpoint as cogvideox_checkpoint
from cogvideox_xdit.fork import FORK as COGVIDEOX
from cogvideox_xdit.fork import checkpoint as cogvideox_model
from common.memory.choice import Choice, FreeMemory, candidates, choose_placement
from common.memory.estimate import Estimate, Estimator, Precision, StageMemory, Workload, imagined
from common.memory.seconds import cpu_seconds, duration
from common.parallel.device_memory import SPARE, wanted
from common.parallel.mesh import Layout, Mesh, distributed
from common.parallel.usp import SequenceParallel
from common.registry.forks import Model, Size, Text, fork_of
from common.registry.layout import Coordinates
from common.system.units import GIB
from common.video.decode import DecodePlan
from common.weights.float8 import Float8Linear
from common.weights.placement import Placement, resident_bytes
from consisid_xdit.fork import FORK as CONSISID
from consisid_xdit.fork import face_attention
from mochi_xdit import MochiPipeline
from mochi_xdit.config import MochiConfig, MochiVAEConfig
from mochi_xdit.demo import random_checkpoint as mochi_checkpoint
from mochi_xdit.fork import FORK as MOCHI
from mochi_xdit.fork import stack as mochi_stack
from mochi_xdit.sampling import workload as mochi_workload
from mochi_xdit.weights import load_transformer
from planner import cost, get_model
from tests.helpers.counting import shorten
from tests.helpers.mochi import write_checkpoint
from tests.helpers.programs import main, read

SCRIPT = Path(__file__).with_name("helpers") / "stage_memory.py"
# What malloc keeps for itself is no part of an estimate.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


@pytest.fixture(scope="module")
def mochi_folder(tmp_path_factory) -> Path:
    vae = MochiVAEConfig(
        encoder_channels=(32, 32, 32, 32), decoder_channels=(32, 64, 64, 128), layers=(1, 1, 1, 1, 1), head_dim=32
    )
    sizes = {"depth": 8, "heads": 12, "head_dim": 64, "hidden_y": 384, "text_dim": 2048, "text_heads": 8}
    config = MochiConfig(**sizes, mlp_x=2048, mlp_y=1024, text_tokens=128, vae=vae)
    folder = tmp_path_factory.mktemp("memory") / "mochi"
    mochi_checkpoint(folder, config)
    return folder


@pytest.fixture(scope="module")
def cogvideox_folder(tmp_path_factory) -> Path:
    sample = {"text_dim": 64, "text_length": 64, "sample_height": 30, "sample_width": 45}
    config = replace(cogvideox_config("5b"), heads=12, head_dim=64, layers=6, time_dim=256, **sample)
    folder = tmp_path_factory.mktemp("memory") / "cogvideox"
    cogvideox_checkpoint(folder, "5b", config, replace(demo_vae("5b"), channels=(32, 64, 64, 128)), torch.float32)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize(
    ("fork", "stage", "offload", "size"),
    [
        ("mochi", "text", "stage", (320, 320, 25)),
        pytest.param("mochi", "sampling", "stage", (320, 320, 19), marks=pytest.mark.long),
        ("mochi", "sampling", "disk", (320, 320, 61)),
        ("mochi", "decode", "stage", (160, 160, 19)),
        ("cogvideox", "sampling", "stage", (240, 320, 9)),
        ("cogvideox", "decode", "stage", (160, 240, 9)),
    ],
)
@pytest.mark.slow
def test_a_process_takes_what_was_estimated(request, fork, stage, offload, size):
    """Within 10 %; resident memory at the peak of the pipeline's own stage, 90 MiB to 1 GiB of it."""
    folder = request.getfixturevalue(f"{fork}_folder")
    command = [sys.executable, str(SCRIPT), fork, str(folder), stage, offload, *map(str, size)]
    done = subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    measured, estimated = map(int, done.stdout.split())
    print(f"measured {measured / 2**20:.0f} MiB, estimated {estimated / 2**20:.0f} MiB")
    assert abs(estimated - measured) < 0.1 * measured


MOCHI_LAYERS = 4
PLACEMENTS = [Placement(), Placement(shard=True), Placement("block"), Placement("block", shard=True), Placement("disk")]


def loaded_and_estimated(folder: Path, layout: Layout) -> list[tuple[int, int]]:
    """Bytes of the transformer's weights by placement: as they are once loaded, and as estimated."""
    with distributed(layout) as mesh:
        found = []
        for float8 in (False, True):
            work = mochi_workload(folder, Size(64, 64, 13, 1), mesh, torch.float32)
            counted = Estimator(work, mesh, Precision(torch.float32, float8), "cpu")
            for placement in PLACEMENTS:
                sp, placed = SequenceParallel(mesh), replace(placement, float8=float8)
                model = load_transformer(folder, sp, "cpu", torch.float32, None, placed, mesh.world)
                estimate = counted.estimate(placement)
                found.append((resident_bytes(model), estimate.stages["sampling"].weights))
        return found


@pytest.mark.parametrize("layout", [Layout(), Layout(ring=3), Layout(cfg=2, ulysses=2)], ids=str)
@pytest.mark.slow
def test_weights_are_counted_to_the_byte(run_ranks, tmp_path, layout):
    folder = write_checkpoint(tmp_path, "diffusers")
    for found in run_ranks(layout.ranks, loaded_and_estimated, folder, layout):
        assert len(found) == 2 * len(PLACEMENTS)
        assert all(loaded == estimated for loaded, estimated in found)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.slow
def test_the_decode_keeps_to_the_memory_it_is_given(tmp_path, monkeypatch, keep):
    """What the estimate says for --max-memory is the plan that runs."""
    folder, used = write_checkpoint(tmp_path), []

    def decoded(decoder, z, plan, split, pause):
        used.append(plan)
        return iter([torch.zeros(1)])

    monkeypatch.setattr("common.video.decode_video.decode_frames", decoded)
    work = mochi_workload(folder, Size(256, 192, 19, 1), Mesh(), torch.float32)
    counted = Estimator(work, Mesh(), Precision(torch.float32, text=torch.float32), "cpu")
    placement = Placement("none" if keep else "stage")
    weights = counted.estimate(placement, keep).stages["decode"].weights
    needs = [wanted(0, counted._plan_bytes(plan)) for plan in counted.plans]
    for need in sorted(set(needs)):
        memory = weights + need + 2**20
        pipe = MochiPipeline(folder, dtype="fp32", offload=placement.offload, max_memory=memory / GIB)
        pipe("a red ball", height=192, width=256, num_frames=19, num_steps=1)
        assert used[-1] == counted.estimate(placement, keep, int(memory)).plan
    assert len(set(used)) == len(used) > 1 and {plan.mode for plan in used} == {"tiled", "exact"}


def small_official(name: str, mesh: Mesh) -> Workload:
    """The true widths with few layers, at the published size."""
    model = get_model(name)
    if name == "mochi":
        return shorten(mochi_workload(model, model.default_size, mesh, negative=True), MOCHI_LAYERS)
    model = replace(model, config=replace(model.config, layers=2))
    return fork_of(model).module("sampling").workload(model, model.default_size, mesh)


def test_float8_is_counted_on_the_path_that_a_gpu_takes():
    """Rounded activations beside the wide ones; the same products."""
    mesh = Mesh()
    on = {d: Estimator(small_official("mochi", mesh), mesh, Precision(float8=True), d) for d in ("cpu", "cuda")}
    assert on["cpu"].flops == on["cuda"].flops
    assert any(layer.multiplies for layer in on["cuda"].model.modules() if isinstance(layer, Float8Linear))
    assert on["cuda"].activations > on["cpu"].activations + 64 * 2**20


def small_model(name: str) -> Model:
    """The registry's of the same numbers, with prompts as long as fit."""
    model = get_model(name)
    if name == "mochi":
        return replace(
            model, stacks=(mochi_stack(replace(model.config, depth=MOCHI_LAYERS), model.latents, Text(256, 256, 0)),)
        )
    small = replace(model.config, layers=2)
    cross = (face_attention(small),) if name == "consisid" else ()
    return cogvideox_model(small, cross, name=name, title=model.title, parameters=0)


@pytest.mark.parametrize("name", ["mochi", "cogvideox-5b", "consisid"])
@pytest.mark.parametrize("layout", [Layout(), Layout(ring=3), Layout(cfg=2, ulysses=5), Layout(2, 2, 2)], ids=str)
@pytest.mark.slow
def test_flops_and_bytes_are_the_planners(name, layout):
    """Two ways to the same figures: rank 0's step run without data, and the planner's sums."""
    with imagined(layout) as mesh:
        counted = Estimator(small_official(name, mesh), mesh)
    model = small_model(name)
    size, place = replace(model.default_size, num_steps=1), Coordinates(layout, 0)
    passes = cost.passes(model, size, place)
    # What is computed once per generation, not in a step (text and image projections, pooling), is little.
    little = 0.01 if name == "mochi" else 0.05
    assert counted.flops == pytest.approx(sum(p.matmul + p.attention for p in passes), rel=little)
    sent = cost.sent(model, size, place)
    # The axis of a sequence and its ring, or its ulysses, are one group where the other is of one rank.
    assert sum(counted.sent.values()) == sent.total and counted.sent["cfg"] == sent.cfg
    assert not dist.is_initialized()


def counts(layout: Layout) -> tuple[int, int, dict[str, int]]:
    with distributed(layout) as mesh:
        counted = Estimator(small_official("cogvideox-5b", mesh), mesh)
        return counted.activations, counted.flops, dict(counted.sent)


@pytest.mark.slow
def test_an_imagined_rank_counts_as_a_real_one(run_ranks):
    layout = Layout(cfg=2, ulysses=2)
    real = run_ranks(layout.ranks, counts, layout)
    for rank in (0, 3):
        with imagined(layout, rank) as mesh:
            counted = Estimator(small_official("cogvideox-5b", mesh), mesh)
        assert real[rank] == (counted.activations, counted.flops, dict(counted.sent))


def estimates(transformer: float = 20, outer: float = 1, ranks: int = 4, decode: float = 5):
    """A model's estimates in GiB: of a transformer that can be shared, with one more for the work."""

    def count(placement: Placement, keep: bool) -> Estimate:
        weights = {"none": transformer, "stage": transformer, "block": outer, "disk": outer}[placement.offload]
        if placement.shard and placement.offload != "block":
            weights = outer + transformer / ranks
        host = transformer / (ranks if placement.shard else 1) if placement.offload == "block" else 0
        text = 1.0 if placement.streams else 9.0
        sizes = {"text": (text, 0.0), "sampling": (weights, 1.0), "decode": (1.0, decode)}
        if keep:
            whole = sum(held for held, _ in sizes.values())
            sizes = {name: (whole, used) for name, (_, used) in sizes.items()}
        stages = {name: StageMemory(int(held * GIB), int(used * GIB)) for name, (held, used) in sizes.items()}
        return Estimate(placement, keep, stages, int(host * GIB), 0, {}, DecodePlan())

    return count


@pytest.mark.parametrize(
    ("free", "host", "ranks", "device", "keep", "want"),
    [
        (80, 99, 1, "cuda", True, "none"),
        (30, 99, 1, "cuda", True, "stage"),
        (30, 99, 4, "cuda", False, "stage"),
        (21, 99, 4, "cuda", False, "stage shard"),
        (21, 99, 1, "cuda", False, "block"),
        (7, 99, 4, "cuda", False, "block"),
        (7, 9, 4, "cuda", False, "block shard"),
        (7, 2, 4, "cuda", False, "disk"),
        (7, 2, 1, "cuda", False, "disk"),
        (21, 99, 1, "cpu", False, "disk"),
        (21, 99, 4, "cpu", False, "stage shard"),
        (30, 2, 1, "cpu", False, "stage"),
    ],
)
def test_as_memory_falls(free, host, ranks, device, keep, want):
    memory = FreeMemory(int(free * GIB), int(host * GIB), device)
    choice = choose_placement(estimates(), memory, ranks, keep)
    said = choice.placement.offload + (" shard" if choice.placement.shard else "")
    assert said == want and choice.keep == (want == "none") and not choice.tight
    if want not in ("none", "stage"):
        assert "would want" in choice.why and f"{free}.0 GiB free" in choice.why
    if (host, device) == (2, "cuda"):
        assert "host memory has 2.0 GiB" in choice.why


def test_models_do_not_stay_where_the_exact_decode_has_no_room_beside_them():
    count = estimates()

    def beside(placement: Placement, keep: bool) -> Estimate:
        return replace(count(placement, keep), warning="cut" if keep else "")

    assert choose_placement(count, FreeMemory(80 * GIB, 99 * GIB), 1, keep=True).keep
    choice = choose_placement(beside, FreeMemory(80 * GIB, 99 * GIB), 1, keep=True)
    assert (choice.placement, choice.keep) == (Placement("stage"), False)
    assert "no room for the exact decode" in choice.why


def test_a_tight_decode_moves_no_weights():
    """No placement gives it more memory, so the fastest one stays."""

    def tight(placement: Placement, keep: bool) -> Estimate:
        return replace(estimates(decode=25)(placement, keep), warning="tight")

    assert choose_placement(tight, FreeMemory(30 * GIB, 99 * GIB), 1).placement == Placement("stage")


def test_seconds_on_a_cpu_are_its_products_by_its_rate(monkeypatch):
    monkeypatch.setattr("common.memory.seconds.cpu_rate", lambda dtype: 1e10)
    assert cpu_seconds(3e15, torch.bfloat16) == 3e5 and cpu_seconds(3e15, torch.bfloat16, ranks=4) == 1.2e6
    assert cpu_seconds(1e12, torch.bfloat16) == 0  # minutes on any machine: not even measured
    assert (duration(3e5), duration(1.2e6), duration(7300)) == ("3 days", "14 days", "2 hours")


def test_hours_on_a_cpu_are_told_and_not_begun_unasked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("common.memory.choice.cpu_seconds", lambda flops, dtype, ranks=1: 30 * 3600.0)
    monkeypatch.setattr("common.system.environment.visible_gpus", lambda: 0)
    folder = write_checkpoint(tmp_path / "model")
    given = ("--model-dir", str(folder), "--prompt", "a", "--width", "32", "--height", "32", "--num-frames", "7")
    given += ("--num-steps", "1", "--output", str(tmp_path / "x.mp4"))
    status, _, err = run(MOCHI, *given, capsys=capsys)
    assert (
        status == 2 and "sampling takes at least 30 hours on this machine's CPU; to wait for it say --device cpu" in err
    )
    status, out, _ = run(MOCHI, *given, "--dry-run", capsys=capsys)
    assert status == 0 and "30 hours on this machine's CPU; refused unless --device cpu is given" in out
    status, _, err = run(MOCHI, *given, "--device", "cpu", capsys=capsys)
    assert status == 0 and "warning: sampling takes at least 30 hours" in err


def test_figures_do_not_contradict_what_is_said_of_them():
    def said(decode: float, free: float) -> str:
        return choose_placement(estimates(decode=decode), FreeMemory(int(free * GIB), 99 * GIB), 1).why

    plenty = said(20, 40)
    assert "wants 26.5 GiB, margin included, of 40.0 GiB free" in plenty and "tight" not in plenty
    tight = said(25, 30)  # fits without the margin alone, and is tried
    assert "needs 26.0 GiB of 30.0 GiB free, which is tight: with its margin it would want 32.8 GiB" in tight
    with pytest.raises(ValueError, match=r"decode needs 31\.000 GiB .*and 30\.999 GiB are free"):
        said(30, 30.999)


def test_candidates_need_less_and_less():
    count = estimates()
    for ranks in (1, 4):
        peaks = [count(p, keep).stages["sampling"].total for p, keep in candidates(ranks, keep=True)]
        assert peaks == sorted(peaks, reverse=True)
        assert all(p.shard is False for p, _ in candidates(1))


def test_what_does_not_fit_is_refused_with_what_to_do():
    for free, ranks, decode, told in (
        (1.5, 1, 0.1, "sampling needs 2.0 GiB on each device even when blocks are read .*--gpus"),
        (1.5, 4, 0.1, "more ranks than 4"),
        (4.0, 1, 5.0, "decode needs 6.0 GiB on each device, and 4.0 GiB are free; let tiles change .* --vae auto"),
    ):
        with pytest.raises(ValueError, match=told):
            choose_placement(estimates(decode=decode), FreeMemory(int(free * GIB), 99 * GIB), ranks)


def test_the_last_few_megabytes_are_tried():
    free = 2 * GIB + SPARE // 4
    choice = choose_placement(estimates(decode=0.1), FreeMemory(free, 99 * GIB), 4)
    assert choice == Choice(Placement("disk"), False, choice.why, tight=True) and "tight" in choice.why


def run(program, *arguments: str, capsys) -> tuple[int, str, str]:
    status = main(program, list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("program", [MOCHI, COGVIDEOX, CONSISID], ids=lambda p: p.name)
@pytest.mark.slow
def test_a_dry_run_needs_neither_weights_nor_gpus(program, capsys):
    status, out, _ = run(program, "--dry-run", "--device", "cuda", "--gpus", "4", "--max-memory", "8.5", capsys=capsys)
    assert status == 0 and "4 x cuda" in out and "TFLOP a step" in out and "rank 3" in out
    assert "chosen      one stage at a time, sharded over the ranks" in out and "weights" in out.split("rank 0")[-1]
    assert not dist.is_initialized()


@pytest.mark.slow
def test_a_dry_run_says_what_it_knows(capsys):
    given = ("--dry-run", "--demo", "--device", "cuda", "--gpus", "3")
    for arguments, expected, told in (
        ((), 0, "say with --max-memory"),
        (("--max-memory", "0.001"), 2, "refused     not enough memory"),
        (("--max-memory", "0.001", "--offload", "stage"), 0, "DOES NOT FIT into 1.0 MiB"),
        (("--max-memory", "8", "--shard-weights"), 0, "as asked    one stage at a time, sharded over the ranks: "),
        (("--max-memory", "8", "--num-videos", "2"), 0, "chosen      every stage stays loaded"),
    ):
        status, out, _ = run(MOCHI, *given, *arguments, capsys=capsys)
        assert status == expected and told in out, out


def test_a_dry_run_of_wrong_use_is_told(capsys):
    for arguments, told in (
        (("--dry-run", "nope"), "cogvideox-1.5-5b-i2v"),
        (("--dry-run", "mochi"), "--dry-run mochi is no model of this program; use mochi-xdit"),
        (("--dry-run", "cogvideox-5b", "--demo"), "exclude each other"),
        (("--dry-run", "--max-memory", "-1"), "--max-memory -1.0 is not a number of GiB above 0"),
        (("--dry-run", "cogvideox-2b", "--width", "850"), "not a positive multiple of 16"),
    ):
        status, _, err = run(COGVIDEOX, *arguments, capsys=capsys)
        assert status == 2 and told in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["cogvideox1.5-5b", "zai-org/CogVideoX1.5-5B", "CogVideoX-1.5-5b"])
def test_a_dry_run_knows_a_model_by_each_of_its_names(name):
    assert read(COGVIDEOX, "--dry-run", name).source.official == "cogvideox-1.5-5b"


@pytest.mark.slow
def test_a_run_places_its_weights_by_itself(tmp_path, capsys):
    """A small picture of the demo, so that its transformer and not its decoder is what needs memory."""
    size = ("--width", "16", "--height", "16", "--num-frames", "1", "--num-steps", "2")
    given = ("--demo", "--gpus", "1", *size, "--dtype", "bf16")
    chosen = {}
    for free in (None, 0.0026):
        output = tmp_path / f"{free}.mp4"
        limit = () if free is None else ("--max-memory", str(free))
        status, _, err = run(MOCHI, *given, *limit, "--device", "cpu", "--output", str(output), capsys=capsys)
        assert status == 0 and "weights: " in err
        chosen[free] = json.loads(output.with_suffix(".json").read_text())["settings"]["offload"]
    assert chosen == {None: "stage", 0.0026: "disk"}
    status, _, err = run(MOCHI, *given, "--max-memory", "0.001", "--output", str(tmp_path / "x.mp4"), capsys=capsys)
    assert status == 2 and "not enough memory" in err
