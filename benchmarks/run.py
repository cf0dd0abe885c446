"""Measure layouts of a model with the real program, and set them beside the published rows.

    make bench                                               # what this machine can: true sizes on GPUs, a demo on CPUs
    python benchmarks/run.py --table mochi-l40-e2e           # a published table on this machine's GPUs
    python benchmarks/run.py --model cogvideox-5b --layouts 1x1x1,2x2x1,2x1x2 --peers diffusers

Layouts are written cfg x ring x ulysses. Without --model-dir, random weights of the true sizes are used: latency does
not depend on the values. Without a GPU the demo checkpoint stands in, and nothing is comparable. Results go to a json
and a csv, row by row; a run that was interrupted goes on where it was.
A json that is put into benchmarks/results/ as run-NAME.json enters docs/performance.md.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import click

from benchmarks import door
from benchmarks.published import Row, rows
from benchmarks.worker import PROGRAMS, Job
from common.parallel.attention import KERNELS
from common.registry.checks import kernel_problems, xfuser_problems
from common.registry.forks import Model, Size, fork_of, get_model, model_names
from common.registry.layout import MOST_RANKS, Layout, layouts_of
from common.registry.settings import default_dtype
from common.run.supervise import supervise
from common.system import environment
from planner.layouts import MOST_FRAMES, MOST_PIXELS, MOST_STEPS, refusal

RESULTS = Path("outputs") / "bench"
VERSIONS = ("torch", "diffusers", "transformers", "numpy")


def context() -> dict[str, Any]:
    """Machine, versions, commit and command, for the head of a results file."""
    gpus: list[str] = []
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        pass
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cores": environment.cores(), "gpus": gpus},
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in VERSIONS}},
        "commit": git.stdout.strip() or "unknown",
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def parse_layouts(text: str, model: Model, size: Size, gpus: int) -> list[Layout]:
    """`all` that fit, or `2x3x1,...` (cfg x ring x ulysses). ValueError names what cannot run."""
    if text == "all":
        found = [d for n in range(1, gpus + 1) for d in layouts_of(n)]
        return [d for d in found if refusal(model, size, d, "ours") is None]
    layouts = []
    for word in text.split(","):
        try:
            cfg, ring, ulysses = (int(n) for n in word.lower().split("x"))
            if min(cfg, ring, ulysses) < 1 or cfg > 2:
                raise ValueError
        except ValueError:
            raise ValueError(f"--layouts: {word!r} is not cfg x ring x ulysses, such as 2x3x1") from None
        layouts.append(Layout(cfg, ring, ulysses))
    for layout in layouts:
        reason = refusal(model, size, layout, "ours")
        if reason:
            raise ValueError(f"--layouts: {layout}: {reason}")
        if layout.ranks > gpus:
            raise ValueError(f"--layouts: {layout} needs {layout.ranks} ranks, and there are {gpus}")
    return layouts


def table_rows(name: str) -> list[Row]:
    """Published rows of a group. ValueError lists the groups."""
    found = [row for row in rows() if row.group == name]
    if not found:
        groups = ", ".join(dict.fromkeys(row.group for row in rows()))
        raise ValueError(f"--table {name} is unknown; choose one of {groups}")
    return found


def demo_folder(model: Model) -> Path:
    """The small checkpoint that the programs make on first use."""
    assert model.demo is not None
    return fork_of(model).demo_folder(model.demo.name)


class Results:
    """A results file: every row is on disk before the next is measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"context": context(), "rows": []}
        if path.is_file():
            try:
                old = json.loads(path.read_text(encoding="utf-8"))
                self.data["rows"] = old["rows"]
                self.data["context"] = old["context"] | {"resumed": context()} if old["rows"] else context()
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path} is no results file; move it away, or name another --output") from None

    def has(self, key: dict[str, Any]) -> bool:
        """Whether the row was measured; one that failed is tried again."""
        return any(row["key"] == key and "error" not in row for row in self.data["rows"])

    def add(self, row: dict[str, Any]) -> None:
        self.data["rows"] = [old for old in self.data["rows"] if old["key"] != row["key"]] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)
        self._csv()

    def _csv(self) -> None:
        columns = ("model", "program", "cfg", "ring", "ulysses", "width", "height", "num_frames", "num_steps", "dtype")
        numbers = ("total_s", "spread_s", "text_s", "sampling_s", "decode_s", "loading_s", "peak_gib", "error")
        with self.path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*columns, *numbers])
            for row in self.data["rows"]:
                writer.writerow([row["key"].get(name, "") for name in columns] + [_cell(row, name) for name in numbers])


def _cell(row: dict[str, Any], name: str) -> Any:
    if name == "peak_gib":
        return round(peak(row), 3)
    stage = name.removesuffix("_s")
    if stage in ("text", "sampling", "decode"):
        return row.get("stages_s", {}).get(stage, "")
    return row.get(name, "")


def peak(row: dict[str, Any]) -> float:
    """GiB at the fullest moment of the fullest rank."""
    return max((gib for ranks in row.get("peak_gib", {}).values() for gib in ranks), default=0.0)


def measure(job: Job) -> dict[str, Any]:
    """Start the ranks of one layout. A failure is a row with `error`; wrong use and interrupts raise."""
    with tempfile.TemporaryDirectory() as folder:
        job = replace(job, output=Path(folder) / "row.json")
        ranks = job.layout.ranks
        command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
        status = supervise(command, ranks, job.device == "cpu", pickle.dumps(job))
        if status > 128:
            raise KeyboardInterrupt
        if status or not job.output.is_file():
            return {"error": f"the ranks ended with status {status}"}
        return json.loads(job.output.read_text(encoding="utf-8"))


def published_seconds(row: dict[str, Any], table: str | None) -> tuple[Row, float] | None:
    """The published row of the same model, size and layout, and our seconds of what it covers."""
    key = row["key"]
    for one in rows():
        same = (one.size.width, one.size.height, one.size.num_frames, one.size.num_steps) == tuple(
            key[name] for name in ("width", "height", "num_frames", "num_steps")
        )
        layout = Layout(key["cfg"], key["ring"], key["ulysses"])
        if one.model.name != key["model"] or not same or one.layout != layout or (table and one.group != table):
            continue
        sampling = row["stages_s"].get("sampling", row["total_s"])
        ours = {"total": row["total_s"], "sampling": sampling, "step": sampling / key["num_steps"]}
        return one, ours[one.kind]
    return None


def show(measured: Sequence[dict[str, Any]], table: str | None) -> None:
    """The rows with their published counterparts; the ratio is published over ours."""
    heads = ("program", "cfg", "ring", "uly", "total s", "+-", "text", "sampling", "decode", "peak GiB")
    click.echo("".join(f"{head:>10}" for head in heads) + f"{'published':>12}{'ratio':>8}  of")
    for row in measured:
        key = row["key"]
        start = f"{key['program'][:10]:>10}{key['cfg']:>10}{key['ring']:>10}{key['ulysses']:>10}"
        if "error" in row:
            click.echo(f"{start}  {row['error']}")
            continue
        stages = row["stages_s"]
        cells = [row["total_s"], row["spread_s"], *(stages.get(n, 0.0) for n in ("text", "sampling", "decode"))]
        line = start + "".join(f"{cell:>10.3f}" for cell in cells) + f"{peak(row):>10.2f}"
        found = published_seconds(row, table)
        if found:
            line += f"{found[0].seconds:>12g}{found[0].seconds / found[1]:>8.2f}  {found[0].kind}, {found[0].id}"
        click.echo(line)


@click.command(
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    }
)
@click.option("--model", type=door.ModelName(), help="Default: the table's, or the first there is.")
@click.option("--model-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Real weights.")
@click.option("--demo", is_flag=True, help="The small demo checkpoint: tests the harness, measures nothing.")
@click.option("--table", help="A published table: its model, size and layouts.")
@click.option("--layouts", default="all", show_default=True, help="all, or cfg x ring x ulysses: 1x1x1,2x3x1")
@click.option("--width", type=click.IntRange(1, MOST_PIXELS))
@click.option("--height", type=click.IntRange(1, MOST_PIXELS))
@click.option("--num-frames", type=click.IntRange(1, MOST_FRAMES))
@click.option("--num-steps", type=click.IntRange(1, MOST_STEPS))
@click.option("--gpus", type=click.IntRange(1, MOST_RANKS), help="At most so many. Default: all; on CPUs two ranks.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Default: bf16 on a GPU, fp32 on a CPU.")
@click.option(
    "--attention",
    type=click.Choice(KERNELS),
    default="auto",
    show_default=True,
    help="Kernel of our program.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--warmup-steps", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--peers", default="", help="Comma-separated: diffusers, diffusers-compiled (one GPU), xfuser.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=door.writable,
    help="Results json. Default: outputs/bench/MODEL-DEVICE.json",
)
def command(**options: Any) -> None:
    """Measure layouts with warm-up, repeats and medians, end to end and per stage, beside the published rows."""
    try:
        jobs, table, path = plan(options)
        results = Results(path)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(remark(jobs[0]), err=True)
    for job in jobs:
        key = key_of(job)
        if results.has(key):
            click.echo(f"{job.program} {job.layout}: measured before", err=True)
            continue
        click.echo(f"{job.program} {job.layout} ...", err=True)
        results.add({"key": key, **measure(job), "date": datetime.date.today().isoformat()})
    wanted = [key_of(job) for job in jobs]
    show([row for row in results.data["rows"] if row["key"] in wanted], table)
    click.echo(remark(jobs[0]))
    click.echo(f"written: {path} and {path.with_suffix('.csv')}", err=True)
    if any("error" in row for row in results.data["rows"] if row["key"] in wanted):
        raise click.exceptions.Exit(1)


def remark(job: Job) -> str:
    """What the seconds can be compared with."""
    if job.demo:
        return "the demo checkpoint at its own size: a test of the harness, comparable with no published row"
    if job.device == "cpu":
        return "on a CPU: comparable with no published row"
    if job.hollow:
        return "random weights of the true sizes: seconds compare with published rows, videos show nothing"
    return "seconds compare with published rows of the same size, layout and GPU"


def key_of(job: Job) -> dict[str, Any]:
    """What makes two rows the same measurement."""
    weights = "random" if job.hollow else job.model_dir.name
    return {
        "model": job.model,
        "program": job.program,
        **asdict(job.layout),
        **asdict(job.size),
        "dtype": job.dtype,
        "device": job.device,
        "attention": job.attention,
        "weights": weights,
    }


def _machine(options: dict[str, Any]) -> tuple[str, int]:
    """Device and number of GPUs, or of the CPU's processes."""
    visible = environment.visible_gpus()
    device = options["device"] if options["device"] != "auto" else ("cuda" if visible else "cpu")
    if device == "cuda" and not visible:
        raise ValueError("--device cuda: no GPU is visible; use --device cpu")
    gpus = options["gpus"] or (visible if device == "cuda" else 2)
    if device == "cuda" and gpus > visible:
        raise ValueError(f"--gpus {gpus}: {visible} GPUs are visible")
    return device, gpus


def _layouts(options: dict[str, Any], table: Sequence[Row], model: Model, size: Size, gpus: int) -> list[Layout]:
    """Those of the published table, each once, or those that the command names."""
    if not table:
        return parse_layouts(options["layouts"], model, size, gpus)
    layouts = list(dict.fromkeys(r.layout for r in table if r.model == model and r.layout.ranks <= gpus))
    if not layouts:
        raise ValueError(f"--table {options['table']}: no layout of {model.name} has {gpus} GPUs or fewer")
    return layouts


def _peers(names: str, base: Job, model: Model, layouts: list[Layout]) -> list[Job]:
    jobs: list[Job] = []
    for name in filter(None, names.split(",")):
        if name not in PROGRAMS[1:]:
            raise ValueError(f"--peers {name} is unknown; choose of {', '.join(PROGRAMS[1:])}")
        jobs += _xfuser(base, model, layouts) if name == "xfuser" else [replace(base, program=name)]
    return jobs


def plan(options: dict[str, Any]) -> tuple[list[Job], str | None, Path]:
    """The jobs that a command asks for. ValueError says what is wrong with it."""
    table = table_rows(options["table"]) if options["table"] else []
    model = get_model(options["model"] or (table[0].model.name if table else model_names()[0]))
    device, gpus = _machine(options)
    demo = options["demo"] or (device == "cpu" and options["model_dir"] is None)
    if table and demo and not options["demo"]:
        raise ValueError(
            f"--table {options['table']} was published for GPUs, and without a GPU or weights nothing would be "
            "comparable; name weights with --model-dir, or say --demo to try the harness"
        )
    size = _size(options, model, table, demo)
    rules = replace(model.rules, sizes=() if demo else model.rules.sizes)
    if problems := rules.problems(size.width, size.height, size.num_frames):
        raise ValueError("\n".join(problems))
    layouts = _layouts(options, table, model, size, gpus)
    if problems := kernel_problems(options["attention"], device, options["dtype"] or "bf16"):
        raise ValueError("\n".join(problems))
    base = Job(
        model=model.name,
        model_dir=demo_folder(model) if demo else options["model_dir"] or _hollow(model),
        hollow=not demo and options["model_dir"] is None,
        demo=demo,
        layout=Layout(),
        size=size,
        device=device,
        dtype=options["dtype"] or default_dtype(device, "bf16"),
        attention=options["attention"],
        repeats=options["repeats"],
        warmup_steps=options["warmup_steps"],
        output=Path(),
    )
    jobs = [replace(base, layout=d) for d in layouts] + _peers(options["peers"], base, model, layouts)
    if options["output"] is not None and options["output"].suffix != ".json":
        raise ValueError(f"--output {options['output']} must end in .json; a csv is written beside it")
    path = options["output"] or RESULTS / f"{model.name}{'-demo' if demo else ''}-{device}.json"
    return jobs, options["table"], path


def _xfuser(base: Job, model: Model, layouts: Sequence[Layout]) -> list[Job]:
    """Our program over the engine xfuser, in the layouts that it can run. ValueError when it can run none here."""
    problems = [xfuser_problems(base.device, base.attention, base.dtype, model.heads, d.ulysses) for d in layouts]
    fitting = [d for d, found in zip(layouts, problems) if not found]
    if not fitting:
        raise ValueError("--peers xfuser: " + "; ".join(problems[0] if problems else ["there is no layout"]))
    return [replace(base, program="xfuser", layout=d) for d in fitting]


def _size(options: dict[str, Any], model: Model, table: Sequence[Row], demo: bool) -> Size:
    size = model.default_size
    if table:
        size = next(row.size for row in table if row.model == model)
    if demo:
        if model.demo is None:
            raise ValueError(f"{model.name} has no demo; name a folder with --model-dir")
        # A functional run of the harness, no measurement of the model.
        size = model.demo.size
    given = {name: options[name] for name in ("width", "height", "num_frames", "num_steps") if options[name]}
    return replace(size, **given)


def _hollow(model: Model) -> Path:
    from benchmarks.true_size import make
    from common.system.files import cache_home

    return make(model, cache_home() / "true-size" / model.name)


def main() -> None:
    """Exit status 0; 1 when a layout failed; 2 for wrong use."""
    try:
        sys.exit(command.main(standalone_mode=False) or 0)
    except click.UsageError as error:
        for problem in error.format_message().splitlines():
            click.echo(f"error: {problem}", err=True)
        sys.exit(2)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted; what was measured is kept, and the same command goes on from there", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
