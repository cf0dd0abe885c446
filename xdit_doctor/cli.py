"""xdit-doctor: what this machine has, whether its ranks can talk and how fast, and a hardware profile for the planner.

Run it first, and paste what it prints into a report.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from common.registry.forks import version
from common.registry.hub import checkpoint_folder
from common.run.supervise import supervise
from common.system import environment
from common.system.extras import pip
from common.system.units import figure
from planner.machine import this_machine
from xdit_doctor.links import Job
from xdit_doctor.profile import default_path, write

TESTED: Mapping[str, tuple[str, str]] = {
    # package: (oldest, newest) it was tested with
    "torch": ("2.13", "2.13"),
    "diffusers": ("0.38", "0.42"),
    "transformers": ("5.0", "5.23"),
    "safetensors": ("0.5", "0.8"),
    "huggingface_hub": ("1.0", "2.4"),
    "sentencepiece": ("0.2", "0.2"),
    "numpy": ("1.26", "2.4"),
    "imageio-ffmpeg": ("0.5", "0.8"),
}
OPTIONAL = ("flash-attn", "torchao", "xfuser", "onnxruntime", "opencv-python-headless", "matplotlib", "scipy")
ROOT = Path(__file__).resolve().parents[1]
SMI_FIELDS = ("name", "memory.total", "memory.used", "driver_version", "pcie.link.gen.current", "clocks.max.sm")
NCCL_SWITCHES = (
    "NCCL_P2P_DISABLE",
    "NCCL_SHM_DISABLE",
    "NCCL_IB_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "CUDA_VISIBLE_DEVICES",
)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:2])


def packages() -> list[dict[str, str]]:
    """Versions against the tested ranges."""
    entries = []
    for name, (oldest, newest) in TESTED.items():
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            entries.append({"package": name, "have": "", "tested": f"{oldest} .. {newest}", "state": "missing"})
            continue
        state = "ok"
        if numbers(have) < numbers(oldest):
            state = "too old"
        elif numbers(have) > numbers(newest):
            state = "newer than tested"
        entries.append({"package": name, "have": have, "tested": f"{oldest} .. {newest}", "state": state})
    return entries


def optional_packages() -> dict[str, str]:
    versions = {}
    for name in OPTIONAL:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi says; empty without a driver."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(SMI_FIELDS, (cell.strip() for cell in line.split(",")))) for line in out.splitlines() if line]


def peer_access() -> list[list[bool]]:
    """Which GPU can read which other's memory directly."""
    import torch

    count = torch.cuda.device_count()
    return [[i != j and torch.cuda.can_device_access_peer(i, j) for j in range(count)] for i in range(count)]


def kernels(device: str) -> dict[str, str]:
    """For each attention kernel `ok`, or why it cannot run."""
    import torch

    from common.parallel.attention import KERNELS, check_kernel

    results = {}
    for kernel in KERNELS:
        try:
            check_kernel(kernel, torch.device(device))
            results[kernel] = "ok"
        except ValueError as error:
            results[kernel] = str(error)
    return results


def ffmpeg() -> str:
    """The version line of the ffmpeg that videos are written with, or why there is none."""
    try:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
        out = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=20, check=True).stdout
        return out.splitlines()[0]
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError, IndexError) as error:
        return f"missing: {error}; {pip()} install imageio-ffmpeg"


def machine() -> dict[str, Any]:
    """System, cores, memory, disk, and switches in the environment that change how NCCL talks."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": environment.cores(),
        "memory_gib": round(memory / 2**30, 1),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        # Not a setting of ours: shown because NCCL reads them, and a forgotten one has cost people their speed-up.
        "switches": {name: os.environ[name] for name in NCCL_SWITCHES if name in os.environ},
    }


def checkpoint(folder: Path) -> dict[str, Any]:
    """Reads every safetensors header under a checkpoint folder: files, GB, and what is damaged or missing."""
    from common.weights.checkpoint import open_checkpoint
    from common.weights.schema import CheckpointError, read_object

    if not folder.is_dir():
        return {"folder": str(folder), "problems": [f"{folder} is not a directory"]}
    indexes = sorted(folder.rglob("*.safetensors.index*.json"))
    files = sorted(folder.rglob("*.safetensors"))
    problems, parts = [], {}
    for path in [*indexes, *files]:
        try:
            weights = open_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if path.suffix == ".safetensors":
            parts[str(path.relative_to(folder))] = round(weights.nbytes / 1e9, 3)
    if not files:
        problems.append(f"{folder} holds no .safetensors file")
    index = folder / "model_index.json"
    kind = "native"
    if index.is_file():
        try:
            kind = str(read_object(index).get("_class_name"))[:200]
        except CheckpointError as error:
            problems.append(str(error))
    return {"folder": str(folder), "kind": kind, "gb": parts, "problems": problems}


def measure(device: str, ranks: int, quick: bool) -> dict[str, Any]:
    """Start the ranks, let them test and measure; `{"self_test": why}` when they could not."""
    cpu = device == "cpu"
    message = (1 << 18 if quick else 1 << 22) if cpu else (1 << 24 if quick else 1 << 26)
    matrix = (192 if quick else 512) if cpu else (2048 if quick else 8192)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "links.json"
        job = Job(device, ranks, message, matrix, output)
        status = supervise([sys.executable, "-m", "xdit_doctor.links"], ranks, cpu, pickle.dumps(job))
        if status or not output.is_file():
            return {"self_test": f"failed: the ranks ended with status {status}; see the error above", "ranks": ranks}
        return json.loads(output.read_text(encoding="utf-8"))


def examine(device: str, ranks: int | None, model_dir: Path | None, quick: bool) -> dict[str, Any]:
    """Everything, as plain data."""
    cards = gpus()
    if device == "auto":
        device = "cuda" if environment.visible_gpus() else "cpu"
    count = ranks or (environment.visible_gpus() if device == "cuda" else 2)
    identity = this_machine(device)
    report: dict[str, Any] = {
        "machine": machine(),
        "gpus": cards if device == "cuda" else [],
        "packages": packages(),
        "optional": optional_packages(),
        "kernels": kernels(device),
        "ffmpeg": ffmpeg(),
        "links": measure(device, count, quick),
        "identity": identity and asdict(identity),
    }
    if device == "cuda":
        import torch

        report["peer_access"] = peer_access()
        report["cuda"] = f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    if model_dir is not None:
        report["checkpoint"] = checkpoint(model_dir)
    return report


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What should be looked at, worst first."""
    remarks = []
    if report["links"].get("self_test") != "passed":
        remarks.append(f"collectives: {report['links'].get('self_test')}")
    remarks += [str(problem) for problem in report.get("checkpoint", {}).get("problems", [])]
    for package in report["packages"]:
        if package["state"] != "ok":
            remarks.append(f"{package['package']} {package['have']}: {package['state']} (tested {package['tested']})")
    if report["ffmpeg"].startswith("missing"):
        remarks.append(f"ffmpeg {report['ffmpeg']}")
    if any(not ok for i, row in enumerate(report.get("peer_access", [])) for j, ok in enumerate(row) if i != j):
        remarks.append("some GPUs cannot read each other's memory (P2P off): NCCL goes through host memory, slowly")
    switches = report["machine"]["switches"]
    if switches.get("NCCL_P2P_DISABLE", "0") != "0":
        remarks.append("NCCL_P2P_DISABLE is set: no direct traffic between GPUs; unset it unless P2P hangs here")
    if report["machine"]["disk_free_gb"] < 5:
        remarks.append(f"only {report['machine']['disk_free_gb']} GB of disk are free")
    return remarks


def show(report: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """The report, line by line."""
    machine_ = report["machine"]
    say(f"system      {machine_['system']}, Python {machine_['python']}, {machine_['cores']} cores")
    say(f"memory      {machine_['memory_gib']} GiB; disk free {machine_['disk_free_gb']} GB")
    for name, value in machine_["switches"].items():
        say(f"environment {name}={value}")
    if not report["gpus"]:
        say("GPUs        none used; ranks on the CPU")
    for i, gpu in enumerate(report["gpus"]):
        say(
            f"GPU {i}       {gpu['name']}, {gpu['memory.used']} of {gpu['memory.total']} MiB used, driver "
            f"{gpu['driver_version']}, PCIe gen {gpu['pcie.link.gen.current']}, up to {gpu['clocks.max.sm']} MHz"
        )
    if "cuda" in report:
        say(f"CUDA        {report['cuda']}")
        for i, row in enumerate(report["peer_access"]):
            say(f"P2P of {i}    " + " ".join("-" if i == j else "yes" if ok else "NO" for j, ok in enumerate(row)))
    for package in report["packages"]:
        say(f"package     {package['package']:16} {package['have'] or '-':12} {package['state']}")
    say("optional    " + ", ".join(f"{name} {have}" for name, have in report["optional"].items()))
    for kernel, state in report["kernels"].items():
        say(f"attention   {kernel:8} {state}")
    say(f"ffmpeg      {report['ffmpeg']}")
    _show_links(report["links"], say)
    if "checkpoint" in report:
        _show_checkpoint(report["checkpoint"], say)
    remarks = warnings(report)
    for warning in remarks:
        say(f"warning     {warning}")
    say(f"verdict     {'all good' if not remarks else f'{len(remarks)} to look at'}")


def _show_links(links: Mapping[str, Any], say: Callable[[str], None]) -> None:
    say(f"self-test   {links['self_test']} on {links['ranks']} ranks")
    if "compute" in links:
        compute = links["compute"]
        say(
            f"compute     matmul {figure(compute['matmul_tflops'])} TFLOP/s, attention "
            f"{figure(compute['attention_tflops'])} TFLOP/s, copy {figure(compute['copy_gbs'])} GB/s"
        )
    for pair in links.get("pairs", []):
        say(f"link {pair['a']} - {pair['b']}  {figure(pair['gbs'])} GB/s each way, {pair['latency_us']:.0f} us")
    if "ring_gbs" in links:
        say(
            f"together    all-to-all {figure(links['all_to_all_gbs'])} GB/s, "
            f"ring {figure(links['ring_gbs'])} GB/s a rank"
        )


def _show_checkpoint(report: Mapping[str, Any], say: Callable[[str], None]) -> None:
    say(f"checkpoint  {report['folder']}: {report.get('kind', '?')}")
    for name, size in report.get("gb", {}).items():
        say(f"  {size:9.3f} GB  {name}")


def gpu_check(mini: bool, root: Path = ROOT) -> int:
    """Run `benchmarks/gpu_check` of the checkout that this program is in; returns its exit status.

    mini: on the CPU, whatever there is. UsageError where there is no checkout: an installed package lacks it.
    """
    if not (root / "benchmarks" / "gpu_check" / "__main__.py").is_file():
        raise click.UsageError(
            "--verify runs from a checkout of the repository, and this is an installed package; clone it, then "
            "make gpu-check PYTHON=python3"
        )
    command = [sys.executable, "-m", "benchmarks.gpu_check", *(["--mini"] if mini else [])]
    return subprocess.run(command, cwd=root, check=False).returncode


@click.command(
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    }
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="What to test; auto: the GPUs if there are any, else the CPU.",
)
@click.option(
    "--ranks", type=click.IntRange(min=1), help="GPUs, or CPU processes, to test. Default: all GPUs; two without a GPU."
)
@click.option(
    "--model-dir",
    type=click.Path(path_type=Path),
    help="Also check the files of this checkpoint: a folder, or the name of a repository in the hub's local cache.",
)
@click.option(
    "--profile",
    "profile_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the hardware profile here. [default: a file in ~/.config/xdit-zoo for machines like this one, by which "
    "the programs choose layouts]",
)
@click.option("--no-profile", is_flag=True, help="Write no profile.")
@click.option("--quick", is_flag=True, help="Small messages: a functional test, not a measurement.")
@click.option(
    "--verify", is_flag=True, help="Measure what is claimed of GPUs, as make gpu-check does; from a checkout."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.version_option(version(), prog_name="xdit-doctor", message="%(prog)s %(version)s", help="Show the version.")
def command(
    device: str,
    ranks: int | None,
    model_dir: Path | None,
    profile_path: Path | None,
    no_profile: bool,
    quick: bool,
    verify: bool,
    as_json: bool,
) -> None:
    """Report what this machine has, test that its ranks can talk, measure how fast, and write a hardware profile."""
    if verify:
        raise click.exceptions.Exit(gpu_check(mini=device == "cpu"))
    if device == "cuda":
        visible = environment.visible_gpus()
        if not visible:
            raise click.UsageError("--device cuda: no GPU is visible; use --device cpu, or check CUDA_VISIBLE_DEVICES")
        if ranks and ranks > visible:
            raise click.UsageError(f"--ranks {ranks}: only {visible} GPUs are visible")
    report = examine(device, ranks, model_dir and _folder(model_dir), quick)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        show(report, click.echo)
    healthy = report["links"].get("self_test") == "passed"
    kept = not healthy or no_profile or _keep(report, profile_path, quick, as_json)
    if not (healthy and kept) or report.get("checkpoint", {}).get("problems"):
        raise click.exceptions.Exit(1)


def _folder(model_dir: Path) -> Path:
    """The folder of --model-dir, before anything is measured."""
    try:
        return checkpoint_folder(model_dir, None)
    except ValueError as error:
        raise click.UsageError(f"--model-dir {error}") from None


def _keep(report: Mapping[str, Any], profile_path: Path | None, quick: bool, quiet: bool) -> bool:
    """Write the profile and say where, or why not; whether nothing went wrong. quiet: only on the error's stream."""
    path, why = (profile_path, "") if profile_path else default_path(report, quick)
    if path is None:
        click.echo(f"profile     not written: {why}; name a file with --profile", err=quiet)
        return True
    try:
        write(report, path)
    except OSError as error:
        click.echo(f"error: the profile cannot be written to {path}: {error.strerror or error}", err=True)
        return False
    note = "" if profile_path else "; on machines like this one the programs choose layouts by it"
    click.echo(f"profile     written to {path} (xdit-plan --model MODEL --gpu {path}){note}", err=quiet)
    return True


def main() -> None:
    """Exit status 0; 1 when the ranks cannot talk, the checkpoint is damaged or something cannot be written; 2 for
    wrong use."""
    try:
        sys.exit(command.main(standalone_mode=False) or 0)
    except click.UsageError as error:
        click.echo(f"error: {error.format_message()}", err=True)
        sys.exit(2)
    except OSError as error:  # what was printed has nowhere to go
        click.echo(f"error: {error.strerror or error}", err=True)
        sys.exit(1)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)


if __name__ == "__main__":
    main()
