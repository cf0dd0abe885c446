"""The CUDA path rehearsed: `make rehearsal`, or `python -m tests.rehearsal --cover`.

Prints a line for each scene: of rank 0's second step kernels, GB, waits of the host, copies between devices and
collectives. Ends with status 1 when a check failed; goes on with the other scenes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from tests.rehearsal.checks import SAMPLING
from tests.rehearsal.scene import Ran, Scene
from tests.rehearsal.scenes import COVER, full, rehearse


def line(scene: Scene, ran: list[Ran], seconds: float) -> str:
    """What rank 0 did in the last sampling step, in the first one of both experts where each has one."""
    trace = ran[0].trace
    step = [name for name, _, _ in trace.launches if name.startswith(SAMPLING)][-1]
    kernels, moved = trace.totals(step)
    syncs = sum(sync.step == step for sync in trace.syncs)
    copies = sum(step in copy.step for copy in trace.copies)
    calls = Counter(collective.op for name, collective in trace.collectives if name == step)
    said = ", ".join(f"{count} {op.strip('_')}" for op, count in sorted(calls.items())) or "none"
    return f"| {scene} | {kernels} | {moved / 1e9:.1f} | {syncs} | {copies} | {said} | {seconds:.0f} |"


def run(job: tuple[Scene, str]) -> tuple[str, str]:
    """A scene's line, and what failed."""
    scene, root = job
    torch.set_num_threads(1)
    started = time.process_time()
    try:
        ran = rehearse(scene, Path(root) / str(multiprocessing.current_process().pid))
        return line(scene, ran, time.process_time() - started), ""
    except Exception:
        return f"| {scene} | failed | | | | | {time.process_time() - started:.0f} |", traceback.format_exc()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cover", action="store_true", help="the covering set, which the tests run")
    parser.add_argument("--only", default="", metavar="TEXT", help="scenes whose description has this in it")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes")
    given = parser.parse_args()
    scenes = [scene for scene in (COVER if given.cover else full()) if given.only in str(scene)]
    print("| scene | kernels | GB | host waits | copies | collectives | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed = []
    with tempfile.TemporaryDirectory() as root, multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for said, error in pool.imap(run, [(scene, root) for scene in scenes]):
            print(said, flush=True)
            failed += [error] if error else []
    print(f"\n{len(scenes) - len(failed)} of {len(scenes)} scenes hold", *failed, sep="\n")
    return 1 if failed else 0
