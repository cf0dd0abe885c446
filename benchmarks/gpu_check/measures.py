"""What is measured on ranks: every function here takes this rank's mesh first and returns plain figures."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import statistics
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import decode, forks, overlap, step
from benchmarks.gpu_check.machine import smi
from benchmarks.worker import PROMPT, inputs
from common.parallel.attention import attention_with_lse, choose_kernel
from common.parallel.device_memory import host_memory
from common.parallel.mesh import Mesh
from common.registry.forks import Size, fork_of, get_model
from common.system.host import bind_to_gpu
from common.system.progress import Report
from common.system.units import GIB
from common.weights.float8 import FLOAT8, to_float8
from xdit_doctor.links import _seconds, compute

STEP = "sampling step"
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


class Watch:
    """Free bytes of the device and of the host, looked at 50 times a second while this is open."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seen, self.done = device, [self._look(device)], threading.Event()

    @staticmethod
    def _look(device: torch.device) -> tuple[float, int, int]:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        return time.perf_counter(), free, host_memory()

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.seen.append(self._look(self.device))

    def __enter__(self) -> Watch:
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.seen.append(self._look(self.device))

    def least(self, start: float, end: float) -> tuple[int, int]:
        """Of the device and of the host, from `start` to `end`."""
        within = [one for one in self.seen if start <= one[0] <= end] or self.seen
        return min(one[1] for one in within), min(one[2] for one in within)


class Diary:
    """What `Report` reports, with the time and the memory that PyTorch holds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lines: list[tuple[str, float, int, int]] = []

    def __call__(self, where: str) -> None:
        cuda = self.device.type == "cuda"
        held = torch.cuda.memory_allocated(self.device) if cuda else 0
        spare = torch.cuda.memory_reserved(self.device) - held if cuda else 0
        self.lines.append((where, time.perf_counter(), held, spare))

    def steps(self) -> list[tuple[float, float, int, int]]:
        """(start, end, bytes held, bytes reserved beside them at the start) of every sampling step."""
        following = zip(self.lines, self.lines[1:])
        return [(a[1], b[1], a[2], a[3]) for a, b in following if a[0].startswith(STEP) and a[0] != b[0]]


def generate(
    mesh: Mesh, name: str, folder: Path, size: Size, output: str, options: Mapping[str, Any], **more: Any
) -> tuple[Tensor | None, Report, Diary, Watch]:
    """One generation by the model's own pipeline. output: `latent` or `frames`. options: the pipeline's; more: of the
    call."""
    model, diary = get_model(name), Diary(mesh.device)
    report = Report(device=mesh.device, tell=diary)
    pipe = fork_of(model).pipeline_class().from_pretrained(folder, mesh=mesh, report=report, **options)
    given = inputs(replace(model, config=pipe.config), size)
    given |= {"height": size.height, "width": size.width, "num_frames": size.num_frames}
    scale = 4.5 if size.guided else 1.0
    with Watch(mesh.device) as watch:
        result = pipe(PROMPT, num_steps=size.num_steps, cfg_scale=scale, seed=1, output=output, **given, **more)
    return result, report, diary, watch


def results(mesh: Mesh, name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Final latents and frames as numpy arrays on rank 0, in fp32."""
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "latents.safetensors"
        frames = generate(mesh, name, folder, size, "frames", {"dtype": "fp32"}, latents_file=file)[0]
        if frames is None:
            return {}
        return {"latent": load_file(file)["latents"].numpy(), "frames": frames.cpu().numpy()}


def sampling(
    mesh: Mesh, name: str, folder: Path, size: Size, options: Mapping[str, Any], bind: bool = True
) -> dict[str, Any]:
    """Seconds of a step and memory while sampling. bind: to the GPU's socket, as the programs do."""
    if bind and mesh.device.type == "cuda":
        bind_to_gpu(int(os.environ["LOCAL_RANK"]))
    before = host_memory()
    _, report, diary, watch = generate(mesh, name, folder, size, "latent", options)
    steps = diary.steps()
    start, held, spare = steps[0][0], steps[0][2], steps[0][3]
    device, host = watch.least(start, steps[-1][1])
    at_start = min(watch.seen, key=lambda one: abs(one[0] - start))[1]
    record = next(r for r in report.records if r.name == "sampling")
    later = [end - begin for begin, end, *_ in steps[1:]] or [steps[0][1] - start]
    found = {
        "first_s": steps[0][1] - start,
        "step_s": statistics.median(later),
        "spread_s": max(later) - min(later),
        "loading_s": sum(r.seconds for r in report.records if r.name.startswith("loading")),
        "peak_gib": record.peak_bytes / GIB,
        "held_gib": held / GIB,
        "taken_gib": (at_start + spare - device) / GIB,
        "host_before_gib": before / GIB,
        "host_least_gib": host / GIB,
        "host_after_gib": watch.seen[-1][2] / GIB,
    }
    if mesh.device.type == "cuda":
        found["reserved_gib"] = torch.cuda.max_memory_reserved(mesh.device) / GIB
    return found


def rate(mesh: Mesh, n: int) -> dict[str, float]:
    """TFLOP/s of a matrix product and of attention in bf16 (fp32 on a CPU), GB/s of a copy."""
    return compute(mesh.device, n)


def planned(mesh: Mesh, package: str, arguments: list[str]) -> dict[str, float]:
    """The plan of a program's `--dry-run`: GiB of weights and of activations in each stage."""
    said, kept = io.StringIO(), sys.argv
    sys.argv = [package, *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            runpy.run_module(package, run_name="__main__")
    finally:
        sys.argv = kept
    print(said.getvalue())
    return read_plan(said.getvalue())


def read_plan(text: str) -> dict[str, float]:
    """The figures of a printed plan for rank 0. ValueError when there are none."""
    line = next((line for line in text.splitlines() if line.startswith("rank 0")), "")
    pattern = r"(text|sampling|decode) ([\d.]+) ([GMK]iB) \+ ([\d.]+) ([GMK]iB)"
    found: dict[str, float] = {}
    for stage, weights, unit, work, other in re.findall(pattern, line):
        found[f"{stage}_weights_gib"] = float(weights) * UNITS[unit] / GIB
        found[f"{stage}_work_gib"] = float(work) * UNITS[other] / GIB
    if "sampling_work_gib" not in found:
        raise ValueError(f"the dry run gave no plan: {text.strip()[-300:] or 'it printed nothing'}")
    return found


def step_sides(mesh: Mesh, args: Namespace, made: Path) -> dict[str, Any]:
    """`benchmarks/step.py` on this device: ours and diffusers' in turns."""
    made.mkdir(parents=True)
    known = get_model(args.model)
    model = forks.function(known, "step")(known, args.heads, args.depth, args.words)
    model.write(made)
    return step.measure(args, mesh, model, made, args.dtype[0])[0]


def overlapped(mesh: Mesh, args: Namespace) -> dict[str, float]:
    """`benchmarks/overlap.py`: seconds of one attention call by number of head groups."""
    return {str(groups): times["median"] for groups, times in overlap.measure(args, mesh).items()}


def kernel(mesh: Mesh, name: str, dtype: str, shape: tuple[int, int, int, int], long: int) -> dict[str, float]:
    """A kernel against attention in fp64: the largest differences, and TFLOP/s for `long` tokens.

    shape: queries, keys, heads, head width. Errors are relative to the largest exact number.
    """
    queries, keys, heads, width = shape
    kind = step.DTYPES[dtype]
    chosen = choose_kernel(name, mesh.device, kind, width)
    generator = torch.Generator(mesh.device).manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, width, device=mesh.device, generator=generator).to(kind)
        for tokens in (queries, keys, keys)
    )
    out, lse = attention_with_lse(q, k, v, chosen)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * width**-0.5
    exact = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())
    big = torch.randn(1, long, heads, width, device=mesh.device, dtype=kind)
    seconds = _seconds(mesh.device, lambda: attention_with_lse(big, big, big, chosen))
    return {
        "out": ((out.double() - exact).abs().max() / exact.abs().max()).item(),
        "lse": (lse.double() - scores.logsumexp(-1)).abs().max().item(),
        "seconds": seconds,
        "tflops": 4 * heads * width * long**2 / seconds / 1e12,
    }


def fast_accumulation(mesh: Mesh, tokens: int, width: int, out: int) -> dict[str, float]:
    """A matmul in fp8 with and without the hardware's fast sums, beside bf16: seconds and relative errors."""
    generator = torch.Generator(mesh.device).manual_seed(0)
    x, weight = (
        torch.randn(rows, width, device=mesh.device, generator=generator).to(torch.bfloat16) for rows in (tokens, out)
    )
    (a, a_scale), (b, b_scale) = to_float8(x), to_float8(weight)
    assert a.dtype == b.dtype == FLOAT8
    wide = F.linear(x.float(), weight.float())
    found = {"bf16_s": _seconds(mesh.device, lambda: F.linear(x, weight))}
    for name, fast in (("exact", False), ("fast", True)):

        def multiply(fast: bool = fast) -> Tensor:
            scales = (a_scale, b_scale.t())
            return torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)

        found[f"{name}_s"] = _seconds(mesh.device, multiply)
        found[f"{name}_error"] = ((multiply().float() - wide).norm() / wide.norm()).item()
    return found


def host_copies(mesh: Mesh, nbytes: int) -> dict[str, float]:
    """GB/s towards the GPU from memory that blocks wait in, and from PyTorch's own pinned memory."""
    from common.weights.blocks import Pinned

    ours, theirs = Pinned(nbytes), torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=mesh.device)
    sources = {"registered_gbs": ours.bytes, "torch_gbs": theirs}
    seconds = {name: _seconds(mesh.device, partial(there.copy_, s, non_blocking=True)) for name, s in sources.items()}
    return {name: nbytes / took / 1e9 for name, took in seconds.items()}


def contexts(mesh: Mesh, name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Which of the ranks' processes have a context on the first GPU while blocks come from the disk."""
    generate(mesh, name, folder, size, "latent", {"offload": "disk"})
    box: list[Any] = [None] * mesh.world.size
    torch.distributed.all_gather_object(box, os.getpid())
    first = smi(("uuid",))[0]["uuid"]
    there = [int(row["pid"]) for row in smi(("pid", "gpu_uuid"), "compute-apps") if row["gpu_uuid"] == first]
    # In a container the driver counts processes by other numbers, or shows none.
    return {"processes": there, "ranks": box, "on_first": sum(pid in there for pid in box)}


def decoded(machine: Any, options: Namespace, how: str, ranks: int) -> dict[str, Any]:
    """`benchmarks/decode.py`: one line of its table. Starts its own ranks."""
    return decode.start(how, ranks, options, machine.processes)
