"""Memory that loading a checkpoint takes on one machine: private to each process, and shared between them.

    python benchmarks/load_memory.py --gigabytes 1.2 --ranks 1 4

Writes a checkpoint of that size in the model's native layout (random weights, fp32) and the same in the diffusers
layout, lets plain processes load it on the CPU at the same time and read every weight once, and prints what
/proc/self/smaps_rollup says has come on top of a process without weights, for the rank that takes most:

    copied   anonymous memory, all that is not the file itself; and the most of it seen while loading
    private  copied, and pages of the file that no other process maps (the kernel can drop those)
    shared   pages of the file that other ranks map too
    together proportional set size of all ranks

Linux only.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from multiprocessing.synchronize import Barrier
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import door, forks
from common.registry.forks import get_model, model_names
from common.system.units import GIB

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def memory() -> dict[str, int]:
    """Bytes of this process: private, shared, and its proportional share of all it maps."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, amount, *_ = line.split()
        fields[name.rstrip(":")] = int(amount) * 1024
    return {
        "copied": fields["Anonymous"],
        "private": fields["Private_Clean"] + fields["Private_Dirty"],
        "shared": fields["Shared_Clean"] + fields["Shared_Dirty"],
        "proportional": fields["Pss"],
    }


def rank(model: str, folder: Path, dtype: str, barrier: Barrier, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    torch.zeros(1) + 1
    barrier.wait()
    before = memory()
    peak = [0, 0]

    def sample(*_: int) -> None:
        peak[1] += 1
        if peak[1] % 10 == 0:
            peak[0] = max(peak[0], memory()["copied"] - before["copied"])

    load = forks.function(get_model(model), "load_transformer")
    loaded = load(folder, dtype=DTYPES[dtype], progress=sample)
    checksum = sum(p.sum(dtype=torch.float32).item() for p in loaded.parameters())
    barrier.wait()
    after = memory()
    barrier.wait()
    results.put({name: after[name] - before[name] for name in after} | {"peak": peak[0], "checksum": checksum})


def measure(model: str, folder: Path, ranks: int, dtype: str) -> list[dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(ranks), context.Queue()
    processes = [context.Process(target=rank, args=(model, folder, dtype, barrier, results)) for _ in range(ranks)]
    for process in processes:
        process.start()
    rows = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert len({row["checksum"] for row in rows}) == 1, "the ranks read different weights"
    return rows


def main() -> None:
    parser = door.Parser(__doc__)
    parser.add_argument("--model", type=forks.named, default=model_names()[0])
    parser.add_argument("--gigabytes", type=door.amount(1000), default=1.2)
    parser.add_argument("--ranks", type=door.ranks, nargs="+", default=[1, 4])
    parser.add_argument("--json", type=door.new_file, help="write the figures there too")
    args = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as place:
        size, depth = forks.function(get_model(args.model), "write_layouts")(Path(place), args.gigabytes)
        print(f"checkpoint: {size / GIB:.2f} GiB in fp32, {depth} blocks; GiB on top of a process without weights")
        print("layout     to    ranks  copied  while loading  private  shared  together")
        for layout, dtype in (("native", "fp32"), ("native", "bf16"), ("diffusers", "fp32")):
            for ranks in args.ranks:
                rows = measure(args.model, Path(place) / layout, ranks, dtype)
                most = {name: max(row[name] for row in rows) / GIB for name in ("copied", "peak", "private", "shared")}
                most["together"] = sum(row["proportional"] for row in rows) / GIB
                table.append({"layout": layout, "dtype": dtype, "ranks": ranks, "checkpoint": size / GIB} | most)
                print(
                    f"{layout:10} {dtype:5} {ranks:5} {most['copied']:7.3f} {most['peak']:14.3f}"
                    f" {most['private']:8.3f} {most['shared']:7.3f} {most['together']:9.3f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
