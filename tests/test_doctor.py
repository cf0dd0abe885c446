"""xdit-doctor on CPU ranks, and what it concludes from findings a GPU machine would give."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from safetensors.torch import save_file

from common.parallel.mesh import Layout, distributed
from planner.hardware import Machine, get_profile, read_profile
from planner.machine import local_profile
from tests.helpers.hub import keep
from xdit_doctor import cli as doctor
from xdit_doctor import profile as profiles
from xdit_doctor.links import Job, run


@pytest.mark.slow
def test_a_report_of_two_cpu_ranks_writes_a_profile_the_planner_reads(tmp_path: Path) -> None:
    path = tmp_path / "made" / "here.json"
    arguments = ["--device", "cpu", "--ranks", "2", "--quick", "--json", "--profile", str(path)]
    command = [sys.executable, "-m", "xdit_doctor.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["links"]["self_test"] == "passed" and len(found["links"]["pairs"]) == 1
    assert found["links"]["compute"]["matmul_tflops"] > 0 and found["links"]["pairs"][0]["gbs"] > 0
    assert {"machine", "packages", "kernels", "ffmpeg"} <= found.keys()
    profile = read_profile(path)
    assert profile.links.gbs == pytest.approx(found["links"]["pairs"][0]["gbs"])
    assert get_profile(str(path)).memory_gib == pytest.approx(found["machine"]["memory_gib"] / 2)


def measured(ranks: int) -> dict:
    with distributed(Layout(ulysses=ranks), "cpu") as mesh:
        return run(Job("cpu", ranks, message=1 << 16, matrix=64, output=Path("unused")), mesh)


def test_every_pair_of_three_ranks_is_measured(run_ranks) -> None:
    results = run_ranks(3, measured, 3)
    pairs = results[0]["pairs"]
    assert [(p["a"], p["b"]) for p in pairs] == [(0, 1), (0, 2), (1, 2)]
    assert all(p["gbs"] > 0 and p["latency_us"] > 0 for p in pairs)
    assert results[0]["ring_gbs"] > 0 and results[0]["all_to_all_gbs"] > 0
    # Times are those of the slowest rank, so all ranks agree about the links.
    assert [r["pairs"] for r in results] == [pairs] * 3


def eight_ranks(far: float) -> dict:
    pairs = [
        {"a": a, "b": b, "gbs": 20.0 if a // 4 == b // 4 else far, "latency_us": 10.0}
        for a in range(8)
        for b in range(a + 1, 8)
    ]
    return {"ranks": 8, "pairs": pairs, "ring_gbs": 24 * far / 20, "all_to_all_gbs": 2.0, "self_test": "passed"}


def test_sockets_are_seen_in_the_pairs() -> None:
    made = profiles.links(eight_ranks(far=2.0), 8)
    assert (made["gbs"], made["across"], made["gpus_per_socket"]) == (20, 0.1, 4)
    assert made["contention"] == pytest.approx((20 / 2.0 - 1) / 5)
    flat = profiles.links(eight_ranks(far=20.0), 8)
    assert (flat["across"], flat["gpus_per_socket"]) == (1.0, 8) and flat["ring_gain"] == pytest.approx(1.2)


EIGHT = {"device": "cuda", "name": "NVIDIA L40", "count": 8}


def findings(**more) -> dict:
    found = {
        "machine": {"switches": {}, "disk_free_gb": 100.0, "memory_gib": 64.0, "system": "Linux"},
        "gpus": [],
        "packages": [],
        "ffmpeg": "ffmpeg version 7",
        "links": {"self_test": "passed", "ranks": 2},
    }
    return found | more


def test_a_known_gpu_keeps_its_calibrated_compute_with_measured_links() -> None:
    gpu = {"name": "NVIDIA L40", "memory.total": "46068"}
    made = profiles.profile(findings(gpus=[gpu], links=eight_ranks(far=2.0), identity=EIGHT))
    known = get_profile("l40")
    assert (made["gpu"], made["matmul"], made["tflops"]) == ("l40", known.matmul, known.tflops)
    assert made["links"]["across"] == 0.1 and made["memory_gib"] == pytest.approx(45.0, abs=0.1)


def test_warnings_name_what_costs_people_their_speed_up() -> None:
    assert doctor.warnings(findings()) == []
    machine = findings()["machine"] | {"switches": {"NCCL_P2P_DISABLE": "1"}, "disk_free_gb": 2.0}
    said = doctor.warnings(findings(machine=machine, peer_access=[[False, False], [True, False]]))
    assert any("NCCL_P2P_DISABLE" in line for line in said)
    assert any("P2P off" in line for line in said) and any("disk" in line for line in said)
    broken = doctor.warnings(findings(links={"self_test": "failed: x"}, ffmpeg="missing: y"))
    assert "failed" in broken[0] and "ffmpeg" in broken[1]


def test_package_states(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.0+cu128", "diffusers": "0.99.1", "numpy": "2.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    states = {p["package"]: p["state"] for p in doctor.packages()}
    assert states["torch"] == "too old" and states["diffusers"] == "newer than tested"
    assert states["numpy"] == "ok" and states["transformers"] == "missing"


def test_the_oldest_tested_versions_are_those_the_project_asks_for() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    asked = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text))
    assert {name: oldest for name, (oldest, _) in doctor.TESTED.items()}.items() <= asked.items()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    whole, cut = folder / "transformer" / "a.safetensors", folder / "transformer" / "b.safetensors"
    save_file({"w": torch.zeros(64, 64)}, whole)
    cut.write_bytes(whole.read_bytes()[:-100])
    (folder / "model_index.json").write_text('{"_class_name": "MochiPipeline"}')
    found = doctor.checkpoint(folder)
    assert found["kind"] == "MochiPipeline" and list(found["gb"]) == ["transformer/a.safetensors"]
    assert len(found["problems"]) == 1 and "b.safetensors" in found["problems"][0]
    assert doctor.checkpoint(tmp_path / "nowhere")["problems"]


def test_a_checkpoint_that_is_not_there_is_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured; names of repositories are those that the programs take."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for given, told in ((tmp_path / "nowhere", "does not exist"), ("genmo/mochi-1-preview", "xdit-download mochi")):
        result = CliRunner().invoke(doctor.command, ["--no-profile", "--model-dir", str(given)])
        assert result.exit_code == 2 and told in result.output and "self-test" not in result.output


def test_a_repository_in_the_hubs_cache_is_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    keep(tmp_path, "someone/finetuned", {"transformer/a.safetensors": b"cut"})
    examined: list[Path] = []
    monkeypatch.setattr(doctor, "examine", lambda device, ranks, folder, quick: examined.append(folder) or findings())
    result = CliRunner().invoke(doctor.command, ["--json", "--no-profile", "--model-dir", "someone/finetuned"])
    assert result.exit_code == 0 and (examined[0] / "transformer" / "a.safetensors").read_bytes() == b"cut"


def test_a_gpu_that_is_not_there_is_wrong_use() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = CliRunner().invoke(doctor.command, ["--device", "cuda"])
    assert result.exit_code == 2 and "no GPU is visible" in result.output


def test_a_profile_is_kept_for_machines_like_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    gpu = {"name": "NVIDIA L40", "memory.total": "46068"}
    whole = findings(gpus=[gpu] * 8, links=eight_ranks(far=2.0), identity=EIGHT)
    path, _ = profiles.default_path(whole, quick=False)
    assert path == tmp_path / "xdit-zoo" / "hardware-8x-nvidia-l40.json"
    profiles.write(whole, path)
    monkeypatch.setattr("planner.machine.this_machine", lambda device: Machine(**EIGHT))
    found = local_profile("cuda")
    assert found is not None and found[0].links.across == 0.1 and str(path) in found[1]


@pytest.mark.parametrize(
    ("more", "quick", "told"),
    [
        ({"identity": EIGHT}, True, "--quick"),
        ({"identity": EIGHT | {"count": 16}}, False, "8 of 16 GPUs"),
        ({"identity": None}, False, "nvidia-smi"),
    ],
)
def test_a_profile_that_is_none_is_not_kept(more: dict, quick: bool, told: str) -> None:
    path, why = profiles.default_path(findings(links=eight_ranks(far=2.0), **more), quick)
    assert path is None and told in why


def test_a_profile_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "mine.json")
    measured = eight_ranks(far=2.0) | {"compute": {"matmul_tflops": 1.0, "copy_gbs": 1.0, "attention_tflops": 1.0}}
    ready = findings(identity=EIGHT, optional={}, kernels={}, links=measured)
    ready["machine"] |= {"python": "3", "system": "Linux", "cores": 2}
    monkeypatch.setattr(doctor, "examine", lambda *_: ready)
    result = CliRunner().invoke(doctor.command, ["--device", "cpu", "--profile", path])
    assert result.exit_code == 1 and f"error: the profile cannot be written to {path}" in result.output
