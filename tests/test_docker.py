"""The images as far as they can be checked without an engine."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common.registry.forks import HERE, forks
from xdit_serve.cli import command as serve

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docker" / "Dockerfile").read_text()
LINES = re.sub(r"\\\n\s*", "", TEXT).splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yml").read_text())
FORKS = [fork for fork in forks() if fork.package in HERE]
PROGRAMS = {fork.name: fork.program for fork in FORKS} | {"serve": "xdit-serve"}


def stages() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in LINES:
        if match := re.fullmatch(r"FROM \S+ AS (\S+)", line):
            found[match[1]] = []
        elif found:
            found[list(found)[-1]].append(line)
    return found


def test_every_program_has_a_target_with_its_entry_point():
    for target, program in PROGRAMS.items():
        (entry,) = [line for line in stages()[target] if line.startswith("ENTRYPOINT")]
        assert json.loads(entry.removeprefix("ENTRYPOINT"))[0] == program
        assert program in PROJECT["scripts"]


def names_of(extras) -> set[str]:
    """Packages of optional dependencies."""
    return {re.split(r"[<>=]", wanted)[0] for extra in extras for wanted in PROJECT["optional-dependencies"][extra]}


def test_an_image_has_the_extras_that_its_fork_names():
    assert set(COMPOSE["services"]) == set(PROGRAMS)
    for fork in FORKS:
        lines = stages()[fork.name]
        installed = {word for line in lines if "pip install" in line for word in line.split()}
        assert installed & names_of(PROJECT["optional-dependencies"]) == names_of(fork.extras)
        assert any(f'image.title="xdit-zoo {fork.name}"' in line for line in lines)


def test_the_server_has_its_extras_and_keeps_its_data():
    lines = stages()["serve"]
    installed = {word for line in lines if "pip install" in line for word in line.split()}
    assert installed & names_of(PROJECT["optional-dependencies"]) == names_of(["serve", "page"])
    assert 'VOLUME ["/data"]' in lines and "STOPSIGNAL SIGTERM" in lines
    (entry,) = [json.loads(line.removeprefix("ENTRYPOINT")) for line in lines if line.startswith("ENTRYPOINT")]
    given = serve.make_context("xdit-serve", entry[1:]).params
    assert (given["host"], str(given["data_dir"]), given["no_auth"]) == ("0.0.0.0", "/data", False)
    service = COMPOSE["services"]["serve"]
    assert "XDIT_API_KEY" in service["environment"] and service["stop_grace_period"] == "40s"
    serve.make_context("xdit-serve", service["command"])


def test_the_version_is_the_packages():
    assert f'org.opencontainers.image.version="{PROJECT["version"]}"' in TEXT
    assert all(service["image"].endswith(f":{PROJECT['version']}") for service in COMPOSE["services"].values())


def test_dependencies_come_before_the_source_and_from_the_lock():
    names = list(stages())
    assert names.index("dependencies") < names.index("app")
    copied = [line for line in stages()["dependencies"] if line.startswith("COPY")]
    assert copied == ["COPY pyproject.toml constraints.txt ./"]
    for line in LINES:
        if "pip install" in line:
            assert "--no-deps" in line or re.search(r"--constraint \S*constraints\.txt", line), line
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    wanted = [re.split(r"[<>=]", d)[0].lower() for d in PROJECT["dependencies"]]
    wanted += [name.lower() for name in names_of(["face", "serve"])]
    assert {name.replace("_", "-") for name in wanted} <= {name.replace("_", "-") for name in pinned}


def test_the_base_has_the_cuda_of_the_wheel():
    """PyTorch 2.13 comes from PyPI for CUDA 13.0; the base's own CUDA decides which drivers the container accepts."""
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    base = re.search(r"^ARG BASE=nvidia/cuda:(\d+\.\d+)\.\d+-base", TEXT, re.M)
    assert pinned and base and (pinned[1], base[1]) == ("2.13.0", "13.0")
    assert base[0].removeprefix("ARG BASE=") in (ROOT / "docker" / "README.md").read_text()


def test_the_image_can_compile():
    """Triton builds launchers with a C compiler and Python's headers when a kernel first runs; CPU kernels are C++."""
    (line,) = [line for line in stages()["python"] if "apt-get install" in line]
    assert {"gcc", "g++", "libc6-dev", "python3-dev"} <= set(line.split())


def ignored(path: str) -> bool:
    """As Docker reads the file: the last pattern that matches, of the path or a folder above it, decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pattern, keep = line.lstrip("!"), line.startswith("!")
            names = [p.split("/")[-1] for p in prefixes] if pattern.startswith("**/") else prefixes
            if any(fnmatch.fnmatch(name, pattern.removeprefix("**/")) for name in names):
                result = not keep
    return result


def test_what_is_copied_is_there_and_sent_and_nothing_else_is():
    for line in LINES:
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists() and not ignored(source), source
    for unwanted in (
        ".git/config",
        "tests/test_docker.py",
        "docs/img/demo.png",
        "common/__pycache__/x.pyc",
        "demo.mp4",
    ):
        assert ignored(unwanted), unwanted
    assert not ignored("mochi_xdit/demo_data/model_index.json")
    packages = PROJECT["scripts"].values()
    assert all(f"COPY {entry.split('.')[0]} " in TEXT for entry in packages)


def test_nothing_runs_as_root_and_data_lies_in_volumes():
    for target in PROGRAMS:
        users = [line for stage in ("app", target) for line in stages()[stage] if line.startswith("USER")]
        assert users[-1] == "USER 10001"
    assert 'VOLUME ["/cache", "/outputs"]' in LINES
    assert "HF_HOME=/cache/" in TEXT


def test_compose_names_targets_and_files_that_exist():
    assert set(COMPOSE) == {"x-gpu", "services", "volumes"}
    for name, service in COMPOSE["services"].items():
        build = service["build"]
        assert (ROOT / "docker" / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file() and build["target"] == name in stages()
        device = service["deploy"]["resources"]["reservations"]["devices"][0]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
        assert service["shm_size"].endswith("gb")
        for volume in service["volumes"]:
            source = volume.split("}")[0]
            assert source.startswith("${") or source.split(":")[0] in COMPOSE["volumes"]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing():
    found = subprocess.run(["hadolint", str(ROOT / "docker" / "Dockerfile")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
