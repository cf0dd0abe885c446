"""One rank of one measured layout: the real pipeline, warmed up, repeated. run.py starts it on every rank."""

from __future__ import annotations

import json
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

from benchmarks import forks
from common.parallel.mesh import Layout, Mesh, distributed
from common.registry.forks import Model, Size, fork_of, get_model
from common.run.channel import Channel, handed_down
from common.system.environment import this_process
from common.system.progress import Report
from common.weights.dtypes import parse_dtype

PROMPT = "A boat moves slowly to the left over a calm sea at sunset, seen from a cliff above the bay."
STAGES = {"encoding": "text", "encoding video": "image", "sampling": "sampling", "decoding": "decode"}
PROGRAMS = ("ours", "diffusers", "diffusers-compiled", "xfuser")


@dataclass(frozen=True)
class Job:
    """What to measure."""

    model: str
    model_dir: Path
    hollow: bool
    """The folder holds no weights: random ones are drawn."""
    layout: Layout
    size: Size
    device: str
    dtype: str
    attention: str
    repeats: int
    warmup_steps: int
    output: Path
    program: str = "ours"
    timeout: float = 1800.0
    demo: bool = False
    """It is a demo checkpoint."""


def run(job: Job) -> dict[str, Any]:
    """Measure; collective. Every rank returns the row."""
    if job.program.startswith("diffusers"):
        return peer(job)
    with distributed(job.layout, job.device, timeout=job.timeout) as mesh:
        report = Report(device=mesh.device)
        generate = pipeline(job, mesh, report)
        generate(job.warmup_steps, 0)
        loading = {r.name: r.seconds for r in report.records if r.name.startswith("loading")}
        rounds = [_round(generate, job, mesh, report, seed) for seed in range(1, job.repeats + 1)]
        row = _medians(rounds)
        row["loading_s"] = sum(loading.values())
        return row


def _round(generate: Callable[[int, int], Any], job: Job, mesh: Mesh, report: Report, seed: int) -> dict[str, Any]:
    """One generation: seconds from the first rank's start to the last rank's end, per stage the slowest rank's."""
    report.records.clear()
    _barrier(mesh)
    start = time.perf_counter()
    generate(job.size.num_steps, seed)
    _barrier(mesh)
    total = time.perf_counter() - start
    mine = {STAGES[r.name]: (r.seconds, r.peak_bytes) for r in report.records if r.name in STAGES}
    everyone: list[dict[str, tuple[float, int]]] = [mine]
    if mesh.world.group is not None:
        everyone = [{} for _ in range(mesh.world.size)]
        dist.all_gather_object(everyone, mine, group=mesh.world.group)
    names = dict.fromkeys(name for one in everyone for name in one)
    seconds = {name: max(one[name][0] for one in everyone if name in one) for name in names}
    peaks = {name: [one.get(name, (0, 0))[1] / 2**30 for one in everyone] for name in names}
    return {"total": total, "stages": seconds, "peak_gib": peaks}


def _barrier(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    if mesh.world.group is not None:
        dist.barrier(mesh.world.group)


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    totals = [one["total"] for one in rounds]
    names = dict.fromkeys(name for one in rounds for name in one["stages"])
    return {
        "total_s": statistics.median(totals),
        "spread_s": max(totals) - min(totals),
        "stages_s": {name: statistics.median([one["stages"][name] for one in rounds]) for name in names},
        "peak_gib": {name: rounds[-1]["peak_gib"].get(name, []) for name in names},
        "repeats": len(rounds),
    }


def pipeline(job: Job, mesh: Mesh, report: Report) -> Callable[[int, int], Any]:
    """(steps, seed) -> frames, on the real pipeline with everything kept loaded."""
    model = get_model(job.model)
    options = {"mesh": mesh, "dtype": job.dtype, "attention": job.attention, "keep_loaded": True, "report": report}
    options["engine"] = "xfuser" if job.program == "xfuser" else "native"
    made = fork_of(model).pipeline_class().from_pretrained(job.model_dir, **options)
    if job.hollow:
        for name in ("load_transformer", "load_decoder", "_load_encoder"):
            if hasattr(made, name):
                setattr(made, name, _drawn(getattr(made, name)))
    extra = inputs(replace(model, config=made.config), job.size)
    size = {"height": job.size.height, "width": job.size.width, "num_frames": job.size.num_frames}
    scale = 4.5 if job.size.guided else 1.0

    def generate(steps: int, seed: int) -> Any:
        return made(PROMPT, num_steps=steps, cfg_scale=scale, seed=seed, **size, **extra)

    return generate


def _drawn(load: Callable[[], torch.nn.Module]) -> Callable[[], torch.nn.Module]:
    from benchmarks.true_size import draw

    return lambda: draw(load())


def inputs(model: Model, size: Size) -> dict[str, Any]:
    """What a model starts from beside a prompt."""
    make = getattr(forks.of(model), "inputs", None)
    return {} if make is None else make(model, size)


def peer(job: Job) -> dict[str, Any]:
    """diffusers on one device with the same folder; sampling by the times between its steps."""
    import diffusers

    model = get_model(job.model)
    if inputs(model, job.size):
        raise ValueError(f"the peer {job.program} is measured for text to video models only, not for {model.name}")
    device = torch.device("cuda" if job.device == "cuda" else "cpu")
    pipe = diffusers.DiffusionPipeline.from_pretrained(job.model_dir, torch_dtype=parse_dtype(job.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    if job.hollow:
        from benchmarks.true_size import draw

        draw(pipe.transformer)
        draw(pipe.vae)
    if job.program == "diffusers-compiled":
        pipe.transformer = torch.compile(pipe.transformer)
    rounds = []
    for seed in range(job.repeats + 1):
        steps = job.size.num_steps if seed else max(2, job.warmup_steps)
        rounds.append(_peer_round(pipe, job, device, steps, seed))
    return _medians(rounds[1:]) | {"loading_s": 0.0}


def _peer_round(pipe: Any, job: Job, device: torch.device, steps: int, seed: int) -> dict[str, Any]:
    ends: list[float] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def at_step(_pipe: Any, _i: int, _t: Any, given: dict[str, Any]) -> dict[str, Any]:
        ends.append(now())
        return given

    start = now()
    pipe(
        PROMPT,
        height=job.size.height,
        width=job.size.width,
        num_frames=job.size.num_frames,
        num_inference_steps=steps,
        guidance_scale=4.5 if job.size.guided else 1.0,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=at_step,
    )
    end = now()
    pace = (ends[-1] - ends[0]) / max(1, len(ends) - 1)
    stages = {"sampling": pace * steps, "decode": end - ends[-1], "text": max(0.0, ends[0] - start - pace)}
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return {"total": end - start, "stages": stages, "peak_gib": {"sampling": [peak]}}


def main() -> None:
    """One rank under common.run.supervise."""
    job: Job = pickle.loads(handed_down())
    at = this_process()
    channel = Channel(at)
    try:
        row = run(job)
    except Exception as error:
        channel.failed("measuring", error)
        sys.exit(1)
    if at.rank == 0:
        job.output.write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main()
