"""Free host memory within the limits of control groups, as containers set them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.parallel.device_memory import host_memory

GB = 10**9


def tree(root: Path, own: str, files: dict[str, object], available: int = 20 * GB) -> Path:
    """A root folder with /proc of a process in the groups `own` and the given files under /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(own)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def v1(group: str, limit: object, used: int, cache: int = 0) -> dict[str, object]:
    stat = f"inactive_file 7\ntotal_inactive_file {cache}"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"memory/{group}{name}": text for name, text in files.items()}


def v2(group: str, limit: object, used: int, cache: int = 0, **more: object) -> dict[str, object]:
    files = {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cache}", **more}
    return {f"{group}{name}": text for name, text in files.items()}


V1 = "9:name=systemd:/\n4:memory:/docker/abc\n1:cpu,cpuacct:/x\n0::/\n"
V2 = "0::/user.slice/job.scope\n"
CASES = [
    ("no groups", "", {}, 20 * GB),
    ("v1: the group's own limit", V1, v1("docker/abc/", 4 * GB, 3 * GB), GB),
    ("v1: page cache counts as free", V1, v1("docker/abc/", 4 * GB, 3 * GB, 2 * GB), 3 * GB),
    ("v1: a parent has less", V1, v1("docker/abc/", 4 * GB, GB) | v1("docker/", 5 * GB, 4 * GB), GB),
    ("v1: inside a container its group is the root", V1, v1("", 4 * GB, GB), 3 * GB),
    ("v1: no limit", V1, v1("docker/abc/", 2**63 - 4096, GB), 20 * GB),
    ("v1: more than the machine has", V1, v1("docker/abc/", 64 * GB, GB), 20 * GB),
    ("v1: used up", V1, v1("docker/abc/", GB, GB + 5), 0),
    ("v2: the group's own limit", V2, v2("user.slice/job.scope/", 4 * GB, 3 * GB, GB), 2 * GB),
    ("v2: a parent has less", V2, v2("user.slice/job.scope/", "max", GB) | v2("user.slice/", 2 * GB, GB), GB),
    ("v2: inside a container its group is the root", "0::/\n", v2("", 3 * GB, GB), 2 * GB),
    ("v2: where the kernel begins to hold it back", "0::/\n", v2("", 9 * GB, GB, **{"memory.high": 3 * GB}), 2 * GB),
    ("v2: no limit", V2, v2("user.slice/job.scope/", "max", GB), 20 * GB),
    ("v2: a group of another memory's", "4:memory:/a\n0::/a\n", v1("a/", 5 * GB, GB) | v2("b/", GB, GB), 4 * GB),
]


@pytest.mark.parametrize("own, files, left", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_host_memory_is_what_the_groups_leave(tmp_path, own, files, left):
    assert abs(host_memory(tree(tmp_path, own, files)) - left) < 1024


def test_without_proc_there_is_a_cautious_figure(tmp_path):
    assert host_memory(tmp_path) == 4 << 30


def test_a_real_group_is_seen():
    """Made and entered as a container runtime would; v1 or v2, whichever has the memory controller here."""
    here = Path("/sys/fs/cgroup")
    parent, limit = (here / "memory", "memory.limit_in_bytes") if (here / "memory").is_dir() else (here, "memory.max")
    group = parent / f"host-memory-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(700 * 2**20))
    except OSError:
        if group.exists():
            group.rmdir()
        pytest.skip("making a control group needs privileges")
    code = "import sys; from pathlib import Path; Path(sys.argv[1], 'cgroup.procs').write_text('0'); "
    code += "from common.parallel.device_memory import host_memory; print(host_memory())"
    try:
        done = subprocess.run([sys.executable, "-c", code, str(group)], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert 100 * 2**20 < int(done.stdout) < 700 * 2**20
    finally:
        group.rmdir()
