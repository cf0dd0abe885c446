"""What is measured, part by part. Models come from the registry; none is named here."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import counts, forks
from benchmarks.gpu_check import checkpoints, measures
from benchmarks.gpu_check.machine import Machine, sockets
from benchmarks.gpu_check.runner import Cell, Part, Row, on_ranks
from benchmarks.run import demo_folder
from common.parallel.attention import KERNELS
from common.registry.forks import Model, Size, fork_of, get_model
from common.registry.layout import Layout
from common.registry.settings import CompileOptions

ROOT = Path(__file__).resolve().parents[2]
DEPTH = 6
"""Blocks of the official width that stand for all; even, since some models want it."""
STEPS = 6
FIRST_TESTS = "test_two_gpus.py"
NO_FP8 = "the GPU does not multiply in fp8 (compute capability 8.9 or newer does)"
MINI = "left out of a miniature on the CPU"
OFF = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
_AUTOTUNED = CompileOptions(compile=True, compile_mode="max-autotune-no-cudagraphs")
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"offload": "none"},
    "bf16 compiled": {"offload": "none", "compiling": CompileOptions(compile=True)},
    "bf16 autotuned": {
        "offload": "none",
        "compiling": CompileOptions(compile=True, compile_mode="max-autotune-no-cudagraphs"),
    },
    "fp8": {"offload": "none", "dtype": "fp8"},
    "fp8 compiled": {"offload": "none", "dtype": "fp8", "compiling": CompileOptions(compile=True)},
    "block": {"offload": "block"},
    "block compiled": {"offload": "block", "compiling": CompileOptions(compile=True)},
}
"""Ways to run a step, as options of the pipelines."""


def all_parts(machine: Machine) -> list[Part]:
    """In the order in which they run: what can hang or be wrong first, then what takes long."""
    named = [(name, get_model(name)) for name in machine.models]
    parts = [Part("tests", "Tests that need a GPU", _tests)]
    parts += [Part(f"exact-{n}", f"{m.title}: every layout against one", partial(_exact, n)) for n, m in named]
    parts.append(Part("kernels", "Attention kernels against fp64, fp8 matmuls, copies", _kernels))
    parts += [Part(f"step-{n}", f"{m.title}: steps of the official size", partial(_step, n)) for n, m in named]
    parts += [Part(f"peers-{n}", f"{m.title}: ours and diffusers' in turns", partial(_peers, n)) for n, m in named]
    parts += [Part(f"decode-{n}", f"{m.title}: decode", partial(_decode, n)) for n, m in named]
    parts += [Part(f"overlap-{n}", f"{m.title}: exchanges behind attention", partial(_overlap, n)) for n, m in named]
    return [*parts, Part("profile", "This machine for the planner", _profile)]


# 1. Tests


def _tests(machine: Machine) -> list[Cell]:
    """The files with tests marked `gpu`; those whose failures hang come first."""
    files = [f for f in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in f.read_text(encoding="utf-8")]
    if machine.mini:
        files = [f for f in files if f.name.endswith("gpu.py")]
    files.sort(key=lambda file: file.name != FIRST_TESTS)
    return [Cell(file.name, partial(_pytest, file)) for file in files]


def _pytest(file: Path) -> Row:
    """Counts of a file's `gpu` tests, what failed and why what was skipped was."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr)
        if not report.is_file():
            raise RuntimeError(f"pytest ended with status {done.returncode}: {(done.stderr or done.stdout)[-300:]}")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    outcome = {case.get("name", "?"): _outcome(case) for case in cases}
    wrong = [name for name, (how, _) in outcome.items() if how == "failed"]
    reasons = sorted({why for how, why in outcome.values() if how == "skipped"})
    passed = sum(how == "passed" for how, _ in outcome.values())
    skipped = sum(how == "skipped" for how, _ in outcome.values())
    return {"passed": passed, "failed": wrong, "skipped_tests": skipped, "reasons": reasons}


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind, how in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            return how, (found.get("message") or "")[:300]
    return "passed", ""


# 2. Exactness


def _demo(mesh: Any, name: str) -> Path:
    """Made in a process of its own: it computes, and what has computed cannot fork."""
    return demo_folder(get_model(name))


def _exact(name: str, machine: Machine) -> list[Cell]:
    model = get_model(name)
    if model.demo is None:
        return [Cell("all", skip="the model has no small checkpoint")]
    if machine.gpus == 1:
        return [Cell("all", skip="there is one GPU")]
    folder = on_ranks(machine, _demo, name)
    config = fork_of(model).pipeline_class().from_pretrained(folder).config
    heads = getattr(config, "heads", model.heads)
    small = replace(model, rules=replace(model.rules, heads=min(heads, model.heads)))
    size = machine.size(model) if machine.mini else model.demo.size
    alone = cache(lambda: on_ranks(machine, measures.results, name, folder, size))
    return [
        Cell(str(layout), partial(_same, machine, name, folder, size, layout, alone))
        for layout in machine.layouts(small, size)
    ]


def _same(machine: Machine, name: str, folder: Path, size: Size, layout: Layout, alone: Any) -> Row:
    """The largest differences to one process: of latents, over their largest number, and of frames, in levels."""
    import numpy as np

    one, many = alone(), on_ranks(machine, measures.results, name, folder, size, layout=layout)
    latents = np.abs(one["latent"] - many["latent"]).max() / np.abs(one["latent"]).max()
    frames = np.abs(one["frames"].astype(int) - many["frames"].astype(int)).max()
    if not np.isfinite(latents):
        raise ValueError("the latents are not finite")
    return {"ranks": layout.ranks, "latents": float(latents), "levels": int(frames)}


# 3. Kernels


def _kernels(machine: Machine) -> list[Cell]:
    models = [get_model(name) for name in machine.models]
    long = 128 if machine.mini else 8192
    stacks = {(stack.heads, stack.head_dim) for model in models for stack in model.stacks}
    cells = []
    for heads, width in sorted(stacks):
        shape = (17, 33, heads, width) if machine.mini else (1031, 2053, heads, width)
        for kernel in KERNELS:
            for dtype in ("bf16", "fp32"):
                key = f"{kernel} {dtype} {heads}x{width}"
                cells.append(Cell(key, partial(_unless_refused, machine, kernel, dtype, shape, long)))
    at = max(models, key=lambda model: model.stacks[0].width).stacks[0].width
    accumulate = partial(on_ranks, machine, measures.fast_accumulation, 16384, at, 4 * at)
    cells.append(Cell("fp8 accumulation", accumulate, NO_FP8 if machine.capability < (8, 9) else ""))
    copies = partial(on_ranks, machine, measures.host_copies, 1 << 29)
    return [*cells, Cell("host copies", copies, "there is no GPU to copy to" if machine.mini else "")]


def _unless_refused(machine: Machine, kernel: str, dtype: str, shape: Any, long: int) -> Row:
    """A kernel that its own check refuses here is no failure."""
    try:
        return on_ranks(machine, measures.kernel, kernel, dtype, shape, long)
    except RuntimeError as error:
        if "attention kernel" in str(error):
            return {"skipped": str(error)}
        raise


# 4. Steps


def _prepared(machine: Machine, name: str) -> tuple[Path, Size, Model]:
    """Checkpoint folder, size and the model as it is in the folder."""
    model = get_model(name)
    if machine.mini:
        return on_ranks(machine, _demo, name), machine.size(model), model
    small = checkpoints.reduced(model, DEPTH)
    size = replace(machine.size(model), num_steps=STEPS)
    return checkpoints.make(small, machine.scratch / name), size, small


def _step(name: str, machine: Machine) -> list[Cell]:
    folder, size, small = _prepared(machine, name)
    plain: dict[str, Any] = {"dtype": "fp32" if machine.mini else "bf16"}
    flops = counts.ours(small, size, Layout())[0][0]
    cells = [Cell("plan", partial(_plan, machine, name)), Cell("rate", partial(_rate, machine))]
    for variant, options in VARIANTS.items():
        run = partial(_sampling, machine, name, folder, size, plain | options, flops)
        cells.append(Cell(variant, run, _why_not(machine, options)))
    block, none = plain | VARIANTS["block"], plain | VARIANTS["bf16"]
    unbound = partial(_sampling, machine, name, folder, size, block, flops, bind=False)
    one_socket = "the machine has one socket" if sockets() == 1 else ""
    cells.append(Cell("block, any socket", unbound, MINI if machine.mini else one_socket))
    segments = partial(_sampling, machine, name, folder, size, none, flops, environment=OFF)
    cells.append(Cell("fixed segments", segments, MINI if machine.mini else ""))
    return cells + list(_two(machine, name, folder, size, plain))


def _why_not(machine: Machine, options: Mapping[str, Any]) -> str:
    if machine.mini and "compiling" in options:
        return MINI
    return NO_FP8 if not machine.mini and options.get("dtype") == "fp8" and machine.capability < (8, 9) else ""


def _two(machine: Machine, name: str, folder: Path, size: Size, plain: dict[str, Any]) -> Iterator[Cell]:
    """What takes two GPUs: the ring's kernels, and who reads from the disk."""
    ring, two = Layout(ring=2), Layout(ulysses=2)
    few = MINI if machine.mini else "there is one GPU" if machine.gpus == 1 else ""
    hopper = "" if machine.capability >= (9, 0) else "the GPU is older than 9.0, where cuDNN's kernel is not chosen"
    for kernel in ("auto", "sdpa"):
        options = plain | {"offload": "none", "attention": kernel}
        run = partial(on_ranks, machine, measures.sampling, name, folder, size, options, layout=ring)
        yield Cell(f"ring 2, {kernel}", run, few or hopper)
    run = partial(on_ranks, machine, measures.contexts, name, folder, size, layout=two)
    yield Cell("disk on 2", run, few)


def _sampling(
    machine: Machine,
    name: str,
    folder: Path,
    size: Size,
    options: Mapping[str, Any],
    flops: float,
    bind: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Row:
    run = partial(on_ranks, machine, measures.sampling, name, folder, size, options, bind, environment=environment)
    row = run()
    return row | {"flops": flops, "tflops": flops / row["step_s"] / 1e12}


def _rate(machine: Machine) -> Row:
    return on_ranks(machine, measures.rate, 256 if machine.mini else 8192)


def _plan(machine: Machine, name: str) -> Row:
    """The programs' own estimate for the whole model; while sampling, a block's activations are those of all."""
    fork = fork_of(get_model(name))
    common = ["--device", machine.device, "--gpus", "1", "--offload", "block"]
    return on_ranks(machine, measures.planned, fork.package, ["--dry-run", name, *common])


# 5. Peers


def _peers(name: str, machine: Machine) -> list[Cell]:
    model = get_model(name)
    try:
        forks.function(model, "step")(model, model.heads, 2, 256)
    except (ValueError, ImportError) as error:
        return [Cell("sides", skip=str(error))]
    sides = ["ours", "ours-compiled", "diffusers", "diffusers-compiled"]
    tokens = 48 if machine.mini else model.video_tokens(model.default_size)
    args = Namespace(
        model=name,
        sides=sides[::2] if machine.mini else sides,
        heads=3 if machine.mini else model.heads,
        depth=2 if machine.mini else DEPTH,
        words=16 if machine.mini else 60,
        tokens=[tokens],
        dtype=["fp32" if machine.mini else "bf16"],
        rounds=1 if machine.mini else 5,
        overlap_groups=1,
        clock="wall",
        device=machine.device,
    )
    made = machine.scratch / f"peers-{name}"
    return [Cell("sides", partial(on_ranks, machine, measures.step_sides, args, made))]


# 6. Decode


def _decode(name: str, machine: Machine) -> list[Cell]:
    model = get_model(name)
    try:
        forks.function(model, "decoder")
    except (ValueError, ImportError) as error:
        return [Cell("decoder", skip=str(error))]
    size = replace(machine.size(model), width=32, height=32, num_frames=7) if machine.mini else model.default_size
    options = Namespace(
        model=name,
        device=machine.device,
        dtype="fp32" if machine.mini else "bf16",
        frames=size.num_frames,
        height=size.height,
        width=size.width,
        narrow=16 if machine.mini else 1,
        chunk=1,
        repeat=1 if machine.mini else 2,
        threads=1,
    )
    counted = [n for n in (1, 2, 4, 6, 8) if n <= machine.ranks]
    cells = [Cell(f"{n} ranks", partial(measures.decoded, machine, options, "streamed", n)) for n in counted]
    plain = Cell("contiguous", partial(measures.decoded, machine, options, "contiguous", 1))
    return [*cells, plain, Cell("diffusers", partial(measures.decoded, machine, options, "peer", 1))]


# 7. Overlap


def _overlap(name: str, machine: Machine) -> list[Cell]:
    model = get_model(name)
    if machine.gpus == 1:
        return [Cell("all", skip="there is one GPU")]
    stack = model.stacks[0]
    tokens = 64 if machine.mini else sum(stream.source.tokens(model.default_size)[0] for stream in stack.streams)
    args = Namespace(
        tokens=tokens,
        heads=stack.heads,
        width=stack.head_dim,
        groups=[1, 2, 4],
        rounds=1 if machine.mini else 7,
        dtype="fp32" if machine.mini else "bf16",
    )
    cells = [Cell("1 rank", partial(on_ranks, machine, measures.overlapped, Namespace(**vars(args) | {"groups": [1]})))]
    for ranks in (n for n in (2, 4, 8) if n <= machine.ranks):
        for kind, groups in (("ulysses", [1, 2, 4]), ("ring", [1])):
            layout = Layout(**{kind: ranks})
            given = Namespace(**vars(args) | {"groups": groups})
            cells.append(Cell(f"{kind} {ranks}", partial(on_ranks, machine, measures.overlapped, given, layout=layout)))
    return cells


# 8. Profile


def _profile(machine: Machine) -> list[Cell]:
    return [Cell("doctor", partial(_doctor, machine))]


def _doctor(machine: Machine) -> Row:
    from xdit_doctor.cli import examine
    from xdit_doctor.profile import profile

    found = examine(machine.device, machine.ranks, None, quick=machine.mini)
    if found["links"].get("self_test") != "passed":
        raise RuntimeError(str(found["links"].get("self_test")))
    return {"found": found, "profile": profile(found)}
