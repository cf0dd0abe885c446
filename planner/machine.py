"""The machine at hand, and what is known of it: the profile that xdit-doctor wrote here, else its kind of GPU."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from planner.hardware import Machine, Profile, get_profile, make_profile, names, read_profile

LAB = Path(__file__).with_name("lab.json")
"""Steps measured on CPU ranks over links of a chosen rate, and the constants that explain them."""


def config_folder() -> Path | None:
    """Where xdit-doctor keeps profiles; None for a user without a home directory."""
    if (folder := os.environ.get("XDG_CONFIG_HOME", "")).startswith("/"):  # others are to be ignored, says its standard
        return Path(folder) / "xdit-zoo"
    try:
        return Path.home() / ".config" / "xdit-zoo"
    except RuntimeError:
        return None


def profile_path(machine: Machine) -> Path | None:
    """Where the profile of such a machine lies, such as ~/.config/xdit-zoo/hardware-8x-nvidia-l40.json.

    One file for each kind of machine: a login node and several kinds of nodes often share a home directory.
    """
    folder = config_folder()
    name = re.sub(r"[^a-z0-9]+", "-", f"{machine.count}x {machine.name}".lower()).strip("-")
    return folder and folder / f"hardware-{name}.json"


def this_machine(device: str) -> Machine | None:
    """What the driver says of all GPUs of this machine, or the system of its processor; None without such a device.

    device: cuda or cpu. torch is not asked, and what CUDA_VISIBLE_DEVICES hides counts: links are the machine's.
    """
    if device == "cpu":
        return Machine("cpu", _processor(), os.cpu_count() or 1)
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    gpus = [line.strip() for line in output.splitlines() if line.strip()]
    return Machine("cuda", " + ".join(dict.fromkeys(gpus)), len(gpus)) if gpus else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.machine() or "CPU"


def recognise(gpu: str) -> str | None:
    """The kind of GPU in a device name such as `NVIDIA A100-SXM4-80GB`; None when the planner has no data on it."""
    words = gpu.lower().replace("-", " ").replace("rtx", " ").split()
    return next((kind for kind in sorted(names()[0], key=len, reverse=True) if kind in words), None)


def local_profile(device: str) -> tuple[Profile, str] | None:
    """This machine's profile, and what to call it in a line to print; None where nothing is known.

    A file of xdit-doctor counts only where kind, name and number of its devices are those of this machine.
    """
    machine = this_machine(device)
    if machine is None:
        return None
    path = profile_path(machine)
    if path is not None and os.path.isfile(path):  # False, and no error, where the folder may not be read
        try:
            profile = read_profile(path)
        except ValueError:
            profile = None  # an old or damaged file must not stop a run that does not need it
        if profile is not None and profile.machine == machine:
            return profile, f"the profile of {machine} in {path}"
    kind = recognise(machine.name) if device == "cuda" else None
    return (get_profile(kind), f"the planner's data on {kind}") if kind else None


@cache
def lab() -> dict[str, Any]:
    """lab.json."""
    return json.loads(LAB.read_text(encoding="utf-8"))


def with_hiding(hardware: tuple[Profile, str] | None, device: str) -> tuple[Profile, str] | None:
    """What `local_profile` knows, for what depends on how exchanges hide; ranks on a CPU have at least an assumed link.

    What hides under what is calibrated on measurements for the CPU, and assumed for GPUs.
    """
    if device != "cpu":
        return hardware
    lab_profile = make_profile("cpu", lab()["profile"])
    if hardware is None:
        return lab_profile, "steps measured on other CPU cores"
    mine, source = hardware
    constants = {name: getattr(lab_profile, name) for name in ("exposed", "group_ms", "copying")}
    return replace(mine, **constants), source
