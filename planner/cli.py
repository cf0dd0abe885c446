"""xdit-plan: every layout of a model on some GPUs with predicted seconds, and the best one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

import click

from common.registry.forks import get_model, model_names, version
from common.registry.layout import Layout, as_options
from planner.hardware import SCHEMES, describe, get_profile, known_names, names, published_machines, with_links
from planner.layouts import Plan, enough, plan, throughput
from planner.machine import local_profile
from planner.model import GIB, RUNTIME_GIB, Prediction, predict

AS_OFFICIAL = "Default: the checkpoint's."


@click.command(
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    }
)
@click.option("--model", metavar="MODEL", help=f"Which checkpoint: {', '.join(model_names())}.")
@click.option("--width", type=int, help=f"Pixels. {AS_OFFICIAL}")
@click.option("--height", type=int, help=f"Pixels. {AS_OFFICIAL}")
@click.option("--num-frames", type=int, help=f"Frames of the video. {AS_OFFICIAL}")
@click.option("--num-steps", type=int, help=f"Denoising steps. {AS_OFFICIAL}")
@click.option(
    "--no-guidance", is_flag=True, help="For --cfg-scale 1: the model runs once a step, not twice. Default: twice."
)
@click.option(
    "--gpu",
    help="Kind of GPU, calibrated profile (see --list-gpus), or a file of xdit-doctor. Default: this machine's.",
)
@click.option("--gpus", type=int, default=1, show_default=True, help="How many GPUs.")
@click.option(
    "--link",
    help="What connects the GPUs of a machine: nvlink, pcie, pcie+qpi (two sockets), or a number of GB/s each way. "
    "Default: what is usual for --gpu, see --list-gpus.",
)
@click.option("--nodes", type=int, help="Machines that share the GPUs. Default: as few as hold them.")
@click.option(
    "--node-link", type=float, help="GB/s that a machine sends to the others. Default: what is usual for --gpu."
)
@click.option(
    "--scheme",
    type=click.Choice(SCHEMES),
    help="Whose way to split the work: this project's (ours), or the published system's (reference). Default: ours; "
    "reference where --gpu is a group of published rows.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects instead of a table.")
@click.option("--list-gpus", is_flag=True, help="List what --gpu knows, and what it was calibrated on.")
@click.version_option(version(), prog_name="xdit-plan", message="%(prog)s %(version)s", help="Show the version.")
def command(**options: Any) -> None:
    """Predict seconds, memory and traffic of every layout, and name the best.

    --gpu takes a kind of GPU (l40), for this project's own scheme on such a machine, or a group of published rows
    (mochi-l40-e2e), for what the published system would take on its machine, with ours beside it. Memory is in GiB
    (2^30 bytes) of weights and activations, bandwidths and traffic in GB (10^9 bytes).
    """
    if options["list_gpus"]:
        _list()
        return
    try:
        plan = _plan(options)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if options["as_json"]:
        click.echo(json.dumps([as_dict(plan, one) for one in plan.layouts], indent=1))
        for refusal in plan.refused:
            click.echo(f"refused: {refusal.layout}: {refusal.reason}", err=True)
    else:
        show(plan)


def _plan(options: dict[str, Any]) -> Plan:
    here = local_profile("cuda") if options["gpu"] is None else None
    if here:
        click.echo(f"from {here[1]}", err=options["as_json"])
    problems = [] if options["model"] else [f"--model is missing; one of {', '.join(model_names())}"]
    if options["gpu"] is None and here is None:
        problems.append(f"--gpu is missing, and nothing is known of GPUs here; {known_names()}")
    if problems:
        raise ValueError("\n".join(problems))
    model = get_model(options["model"])
    node_link = options["node_link"]
    if node_link is not None and not 0 < node_link < float("inf"):
        raise ValueError(f"--node-link {node_link} is not a number of GB/s above 0")
    base = here[0] if here else get_profile(options["gpu"])
    profile = with_links(base, options["link"], node_link)
    default = model.default_size
    names = ("width", "height", "num_frames", "num_steps")
    overrides = {name: options[name] for name in names if options[name] is not None}
    size = replace(default, guided=default.guided and not options["no_guidance"], **overrides)
    return plan(model, size, options["gpus"], profile, options["scheme"], options["nodes"])


def as_dict(plan: Plan, one: Prediction) -> dict[str, Any]:
    """One layout as plain data: seconds, GiB (and GB of 1e9 bytes) per GPU and stage, bytes the busiest GPU sends.

    ours: beside a published system's, the seconds of this project's scheme on the same machine.
    """
    beside = {"ours": _seconds(_ours(plan, one))} if plan.scheme == "reference" else {}
    return {
        "cfg": one.layout.cfg,
        "ring": one.layout.ring,
        "ulysses": one.layout.ulysses,
        "seconds": _seconds(one),
        **beside,
        "memory_gib": one.memory_gib,
        "memory_gb": {stage: round(gib * GIB / 1e9, 2) for stage, gib in one.memory_gib.items()},
        "bytes": {**asdict(one.sent), "total": one.sent.total},
        "bound": one.bound,
        "speedup": plan.speedup(one),
        "efficiency": plan.speedup(one) / plan.ranks,
        "fits": one.fits,
        "best": one is plan.best,
    }


def _seconds(one: Prediction) -> dict[str, float]:
    return {name: getattr(one, name) for name in ("total", "sampling", "step", "text", "decode")}


def _ours(plan: Plan, one: Prediction) -> Prediction:
    """The same layout of our scheme on the machine of a published system."""
    return predict(plan.model, plan.size, one.layout, plan.profile, "ours", plan.nodes)


def _list() -> None:
    gpus, profiles = names()
    click.echo("kinds of GPU:")
    for name in gpus:
        click.echo(f"  {name:24}{describe(name)}")
    click.echo("a profile that xdit-doctor wrote: the path of its file")
    click.echo("calibrated profiles (groups of published rows, scheme reference):")
    for name in profiles:
        click.echo(f"  {name:24}{describe(name)}")


COLUMNS = ("cfg", "ring", "ulysses", "total s", "step s", "sampling", "text", "decode", "speed-up", "eff. %", "sent GB")
MEMORY = "GiB text/DiT/VAE"


def show(plan: Plan) -> None:
    """The table, the best layout and by which profile, what was refused, and whether fewer GPUs would do."""
    size, profile = plan.size, plan.profile
    between = f"; {plan.nodes} machines, {profile.links.node_gbs:g} GB/s between them" if plan.nodes > 1 else ""
    click.echo(
        f"{plan.model.title}, {size.width}x{size.height}, {size.num_frames} frames, {size.num_steps} steps on "
        f"{plan.ranks} x {profile.name} ({profile.links}{between}), scheme: {plan.scheme}"
    )
    columns = [*COLUMNS, *(["ours, s"] if plan.scheme == "reference" else [])]
    click.echo("".join(f"{name:>9}" for name in columns) + f"{MEMORY:>18}  bound by")
    for one in plan.layouts:
        click.echo(_line(plan, one))
    click.echo(f"best: {_named(plan.best.layout)}")
    if plan.scheme == "reference":
        _beside(plan)
    if any(not one.fits for one in plan.layouts):
        click.echo(f"! a stage and {RUNTIME_GIB:g} GiB for CUDA are more than the {profile.memory_gib:g} GiB of a GPU")
    for refusal in plan.refused:
        click.echo(f"refused: {refusal.layout}: {refusal.reason}")
    _credits(plan)
    if plan.ranks > 1 and (fewer := enough(plan)).layout.ranks < plan.ranks:
        ranks = fewer.layout.ranks
        click.echo(f"as fast on {ranks} of these GPUs: --gpus {ranks}, {fewer.layout}: {fewer.total:.1f} s")
    if plan.ranks > 1:
        replicas, one = throughput(plan)
        often = f"{3600 * replicas / one.total:.1f} videos an hour"
        click.echo(f"most videos: --replicas {replicas}, each {one.layout}: {one.total:.1f} s a video, {often}")


def _named(layout: Layout) -> str:
    return f"{layout}   ({as_options(layout)})"


def _beside(reference: Plan) -> None:
    """What our scheme would take on the machine whose published system the table predicts."""
    try:
        best = plan(reference.model, reference.size, reference.ranks, reference.profile, "ours", reference.nodes).best
    except ValueError as error:  # the published rows say nothing of memory, so a plan for their system does not refuse
        click.echo(f"ours there: {error}")
        return
    click.echo(f"ours there: {_named(best.layout)}: {best.total:.1f} s, {best.sampling:.1f} of them sampling")


def _credits(plan: Plan) -> None:
    """What the prediction rests on, and where a published machine differs."""
    profile = plan.profile
    if not profile.calibrated_on:
        click.echo("not calibrated: efficiencies are guesses; trust the order more than the seconds")
        return
    click.echo(f"{profile.name}: {profile.calibration}; links: {profile.links}")
    others = published_machines(profile)
    for name, other in others.items():
        click.echo(
            f"  other published rows on {profile.name} ran with {other.links}: --gpu {name} predicts that machine"
        )
    if others:
        click.echo("  --link says what yours are, xdit-doctor measures them")


def _line(plan: Plan, one: Prediction) -> str:
    layout, speedup = one.layout, plan.speedup(one)
    memory = "/".join(f"{one.memory_gib[stage]:.1f}" for stage in ("text", "sampling", "decode"))
    cells = [
        str(layout.cfg),
        str(layout.ring),
        str(layout.ulysses),
        f"{one.total:.1f}",
        f"{one.step:.3f}",
        f"{one.sampling:.1f}",
        f"{one.text:.1f}",
        f"{one.decode:.1f}",
        f"{speedup:.2f}",
        f"{100 * speedup / plan.ranks:.0f}",
        f"{one.sent.total / 1e9:.1f}",
    ]
    if plan.scheme == "reference":
        cells.append(f"{_ours(plan, one).total:.1f}")
    return "".join(f"{cell:>9}" for cell in cells) + f"{memory + ('' if one.fits else ' !'):>18}  {one.bound}"


def main() -> None:
    """Exit status 0, 1 where the output cannot be written, or 2 for wrong use."""
    try:
        command.main(standalone_mode=False)
    except click.UsageError as error:
        for problem in error.format_message().splitlines():
            click.echo(f"error: {problem}", err=True)
        sys.exit(2)
    except OSError as error:  # what was printed has nowhere to go
        click.echo(f"error: {error.strerror or error}", err=True)
        sys.exit(1)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)


if __name__ == "__main__":
    main()
