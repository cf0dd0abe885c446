"""What a wheel holds: the packages with their data, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest

from common.registry.forks import HERE

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", *HERE, "planner", "xdit_doctor", "xdit_download", "xdit_serve")
COMMANDS = (*(name.replace("_", "-") for name in HERE), "xdit-plan", "xdit-doctor", "xdit-download", "xdit-serve")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy of the tracked files, without the network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w"]
    done = subprocess.run([*build, str(out), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.mark.slow
def test_its_name_and_metadata(wheel):
    assert Path(str(wheel.filename)).name == "xdit_zoo-0.1.0-py3-none-any.whl"
    (name,) = (n for n in wheel.namelist() if n.endswith("METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("xdit-zoo", "0.1.0")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) >= {"fp8", "flash", "xfuser", "plot", "face", "serve"}


@pytest.mark.slow
def test_the_commands(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert [line.split(" = ")[0] for line in text.splitlines() if " = " in line] == sorted(COMMANDS)


def test_nothing_but_the_packages_and_their_data(wheel):
    for name in wheel.namelist():
        top = PurePosixPath(name).parts[0]
        assert top in PACKAGES or top == "xdit_zoo-0.1.0.dist-info", name
        if top in PACKAGES:
            assert PurePosixPath(name).suffix in {".py", ".json", ".model", ".safetensors", ".onnx", ".md"}, name


def test_every_module_and_the_demo_checkpoint_are_inside(wheel):
    held = set(wheel.namelist())
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name for name in tracked if (ROOT / name).is_file()} <= held
    for part in ("transformer", "vae"):
        assert f"mochi_xdit/demo_data/{part}/diffusion_pytorch_model.safetensors" in held
    assert "mochi_xdit/demo_data/tokenizer/spiece.model" in held
    assert sum(info.file_size for info in wheel.infolist()) < 40e6
