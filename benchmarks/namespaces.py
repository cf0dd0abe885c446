"""Ranks on one machine that talk over links of a chosen bandwidth: a network namespace each, joined by a bridge.

Linux, root, and the programs `ip` and `tc` (iproute2). Everything made is removed when a `Network` is left.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

DEVICE = "eth0"
"""A rank's end of its link, inside its namespace."""
BURST_SECONDS = 0.004
"""The token bucket holds what leaves in the longest tick of a kernel's timer (100 to 1000 Hz run up to 10 ms)."""
LEAST_BURST = 2**16
"""Bytes: one segment that the kernel hands down at once; a smaller bucket would let none of them through."""


def problem() -> str | None:
    """Why no namespaces can be made here."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} not found; install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    trial = f"trial{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    if made.returncode:
        return f"this system makes no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", trial], check=True)
    return None


def limit(mbit: float) -> None:
    """Called by a rank: what it sends from now on leaves at so many Mbit/s; 0: without a limit."""
    subprocess.run(["tc", "qdisc", "del", "dev", DEVICE, "root"], capture_output=True)  # there may be none
    if mbit:
        burst = max(LEAST_BURST, int(mbit * 1e6 / 8 * BURST_SECONDS))
        shaper = ["tbf", "rate", f"{mbit}mbit", "burst", f"{burst}b", "latency", "200ms"]
        subprocess.run(["tc", "qdisc", "add", "dev", DEVICE, "root", *shaper], check=True)


def sent_bytes() -> int:
    """Called by a rank: what has left over its link so far, headers included."""
    return int(Path(f"/sys/class/net/{DEVICE}/statistics/tx_bytes").read_text())


class Network:
    """Namespaces of `ranks` ranks. Leaving it ends the processes in them and removes all."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.processes = ranks, list[subprocess.Popen[bytes]]()
        # Names of interfaces have at most 15 characters.
        self.bridge = f"br{os.getpid()}"
        self.names = [f"rank{os.getpid()}-{i}" for i in range(ranks)]
        self.subnet = f"10.77.{os.getpid() % 250}"

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._remove()

    def _make(self) -> None:
        _ip(f"link add {self.bridge} type bridge")
        _ip(f"link set {self.bridge} up")
        for i, name in enumerate(self.names):
            _ip(f"netns add {name}")
            _ip(f"link add {self.bridge}-{i} type veth peer name {DEVICE} netns {name}")
            _ip(f"link set {self.bridge}-{i} master {self.bridge} up")
            _ip(f"-n {name} addr add {self.subnet}.{i + 1}/24 dev {DEVICE}")
            _ip(f"-n {name} link set {DEVICE} up")
            _ip(f"-n {name} link set lo up")

    def _remove(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for i, name in enumerate(self.names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            subprocess.run(["ip", "link", "del", f"{self.bridge}-{i}"], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    def run(self, command: Sequence[str], variables: dict[str, str]) -> int:
        """The command on every rank, with torchrun's variables and gloo on the link; the first status that is not 0.

        When one fails the others are ended, since they would wait for it.
        """
        shared = {"WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        shared |= {"MASTER_ADDR": f"{self.subnet}.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": DEVICE}
        for rank, name in enumerate(self.names):
            environment = os.environ | variables | shared | {"RANK": str(rank)}
            inside = ["ip", "netns", "exec", name, *command]
            self.processes.append(subprocess.Popen(inside, env=environment))
        while True:
            found = [process.poll() for process in self.processes]
            if failed := next((status for status in found if status), None):
                return failed
            if None not in found:
                return 0
            time.sleep(0.1)


def _ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)
