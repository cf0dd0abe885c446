"""What is read of a machine with GPUs, on trees of files like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.system import host

ADDRESSES = ("0000:17:00.0", "0000:65:00.0", "0000:ca:00.0", "0000:e3:00.0")


def machine(root: Path, models: tuple[str, ...] = ("NVIDIA H100",) * 4, cores: tuple[str, ...] = ()) -> Path:
    """Two sockets of 8 cores and their hyper-threads, two GPUs on each."""
    cores = cores or ("0-7,16-23", "0-7,16-23", "8-15,24-31", "8-15,24-31")
    for number, (address, model, near) in enumerate(zip(ADDRESSES, models, cores)):
        gpu, device = root / "proc/driver/nvidia/gpus" / address, root / "sys/bus/pci/devices" / address
        gpu.mkdir(parents=True)
        device.mkdir(parents=True)
        text = f"Model: \t\t {model}\nIRQ:   \t\t 18\nGPU UUID: \t GPU-{number}a-b\nBus Location: \t {address}\n"
        (gpu / "information").write_text(text)
        (device / "local_cpulist").write_text(near + "\n")
    return root


FIRST, SECOND = {*range(8), *range(16, 24)}, {*range(8, 16), *range(24, 32)}


@pytest.mark.parametrize(
    ("rank", "environment", "near"),
    [
        (0, {}, FIRST),
        (3, {}, SECOND),
        (4, {}, set()),
        (0, {"CUDA_VISIBLE_DEVICES": "2,1"}, SECOND),
        (1, {"CUDA_VISIBLE_DEVICES": "2, 1"}, FIRST),
        (0, {"CUDA_VISIBLE_DEVICES": "GPU-3a"}, SECOND),
        (5, {"CUDA_VISIBLE_DEVICES": "GPU-3a-b"}, SECOND),  # each rank is shown its own GPU alone
        (0, {"CUDA_VISIBLE_DEVICES": "GPU-"}, set()),  # several begin so
        (0, {"CUDA_VISIBLE_DEVICES": "MIG-3a"}, set()),
        (0, {"CUDA_VISIBLE_DEVICES": "9"}, set()),
        (0, {"CUDA_VISIBLE_DEVICES": ""}, set()),
    ],
)
def test_cores_near_a_ranks_gpu(tmp_path, rank, environment, near):
    assert host.near_cores(rank, environment, machine(tmp_path)) == near


def test_numbers_of_different_models_are_known_only_in_the_order_of_addresses(tmp_path):
    machine(tmp_path, models=("NVIDIA A100", "NVIDIA H100", "NVIDIA A100", "NVIDIA H100"))
    assert host.near_cores(3, {}, tmp_path) == set()
    assert host.near_cores(3, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, tmp_path) == SECOND
    assert host.near_cores(0, {"CUDA_VISIBLE_DEVICES": "GPU-3"}, tmp_path) == SECOND


def test_a_process_is_bound_within_the_cores_it_may_use(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    bound = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {6, 7, 8, 9}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: bound.append(cores), raising=False)
    machine(tmp_path)
    host.bind_to_gpu(0, tmp_path)
    host.bind_to_gpu(2, tmp_path)
    assert bound == [{6, 7}, {8, 9}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {6, 7})
    host.bind_to_gpu(0, tmp_path)  # all of them near
    host.bind_to_gpu(2, tmp_path)  # none of them near
    host.bind_to_gpu(0, tmp_path / "no such machine")
    (tmp_path / "sys/bus/pci/devices" / ADDRESSES[0] / "local_cpulist").write_text("0-x")
    host.bind_to_gpu(0, tmp_path)
    assert len(bound) == 2


def test_a_folder_for_temporary_files_is_found_where_the_usual_ones_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "as it was")
    host.ensure_temporary_folder(tmp_path)
    assert os.environ["TMPDIR"] == "as it was"

    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(host.tempfile, "gettempdir", none)
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    host.ensure_temporary_folder(tmp_path)
    assert os.environ["TMPDIR"] == "/dev/shm"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    host.ensure_temporary_folder(tmp_path)
    assert os.environ["TMPDIR"] == str(tmp_path)
