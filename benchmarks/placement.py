"""Memory of a transformer's weights by where they are kept: `--offload`, `--shard-weights`, float8.

    python benchmarks/placement.py --depth 6 --json placement.json

A transformer of the true width and `--depth` blocks (6 of Mochi's: 2.7 GB in bf16), zeros in a sparse file since
values do not matter, predicts once for 160 tokens in a fresh process for each row. Figures: the process's peak resident
memory above what it was before loading (Linux, /proc/self/status; pages of mapped files count), and bytes that the
ranks gather in one prediction. Ranks are CPU processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import door, forks
from common.parallel.mesh import Layout, distributed
from common.parallel.usp import SequenceParallel
from common.registry.forks import get_model, model_names
from common.system.units import GIB
from common.weights.blocks import FromShares
from common.weights.placement import Placement, resident_bytes

ROWS = [(1, "stage", False, False), (1, "block", False, False), (1, "disk", False, False)]
ROWS += [(1, "stage", False, True), (1, "disk", False, True)]
ROWS += [(ranks, "stage", True, False) for ranks in (2, 4, 8)] + [(4, "block", True, False), (4, "stage", True, True)]


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def rank(name: str, folder: Path, place: tuple[Any, ...], number: int, port: int, results: Any) -> None:
    ranks, offload, shard, float8 = place
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.nn.functional.linear(torch.zeros(64, 64), torch.zeros(64, 64))
    with distributed(Layout(ring=ranks)) as mesh, torch.inference_mode():
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        model = forks.function(get_model(name), "load_transformer")(
            folder,
            SequenceParallel(mesh),
            "cpu",
            torch.bfloat16,
            placement=Placement(offload, shard, float8),
            world=mesh.world,
        )
        loaded = resident("VmHWM") - before
        Path("/proc/self/clear_refs").write_text("5")
        forks.function(get_model(name), "predict")(model)
        gathered = 0
        stream = model.blocks.stream
        if stream is not None and isinstance(stream.source, FromShares):
            gathered = sum((ranks - 1) * FromShares.share_bytes(layout.nbytes, ranks) for layout in stream.layouts)
        found = {"peak": resident("VmHWM") - before, "loading": loaded, "held": resident_bytes(model)}
        results.put(found | {"gathered": gathered})


def measure(name: str, folder: Path, place: tuple[Any, ...]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    processes = [context.Process(target=rank, args=(name, folder, place, i, port, results)) for i in range(place[0])]
    for process in processes:
        process.start()
    rows = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return {field: max(row[field] for row in rows) for field in rows[0]}


def main() -> None:
    parser = door.Parser(__doc__)
    parser.add_argument("--model", type=forks.named, default=model_names()[0])
    parser.add_argument("--depth", type=door.whole(1024), default=6)
    parser.add_argument("--json", type=door.new_file, help="write the figures there too")
    arguments = parser.parse_args()
    write = forks.function(get_model(arguments.model), "write_blocks")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        meta = write(Path(folder), arguments.depth)
        block = 2 * sum(p.numel() for p in meta.blocks[0].parameters())
        total = 2 * sum(p.numel() for p in meta.parameters())
        print(
            f"{total / GIB:.2f} GiB in bf16, {arguments.depth} blocks of {block / 2**20:.0f} MiB; "
            "GiB above an empty process"
        )
        print("ranks  offload  sharded  float8    peak  in blocks  held  gathered")
        for place in ROWS:
            row = measure(arguments.model, Path(folder), place)
            table.append(dict(zip(("ranks", "offload", "shard", "float8"), place)) | row)
            figures = f"{row['peak'] / GIB:6.2f}  {row['peak'] / block:9.2f}  {row['held'] / GIB:4.2f}"
            figures += f"  {row['gathered'] / GIB:8.2f}"
            print(f"{place[0]:5}  {place[1]:7}  {place[2]!s:7}  {place[3]!s:6}  {figures}", flush=True)
    if arguments.json:
        about = {"block": block, "total": total, "machine": platform.machine(), "date": time.strftime("%Y-%m-%d")}
        arguments.json.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
