"""Seconds and peak memory of a VAE decode: streamed and whole, on one rank and over several.

    python benchmarks/decode.py                                           # small models on the CPU, 1 and 2 ranks
    python benchmarks/decode.py --device cuda --narrow 1 --height 480 --width 848 --frames 163 --ranks 1 2 4 8
    python benchmarks/decode.py --model cogvideox-5b --frames 49 --ranks 1 2 --peer
    python benchmarks/decode.py --model mochi --narrow 1 --height 480 --width 848 --ranks 1 6 --count  # nothing is run

Random weights, which decode as fast as trained ones. Every line is a set of fresh processes. The peak is what decoding
adds to the process that needs most: on the CPU resident memory (Linux), on a GPU what PyTorch allocated. `estimate` is
what plans are chosen by. `--peer` adds diffusers' decoder of the same sizes, one process, all at once. `--count` says
instead, without data and by the plan that so many ranks choose, the share of all FLOPs that lies on the critical path,
the most that a rank sends, as tails to the next one and to those that share its chunks, and what the busiest rank reads
and writes, by kind of operation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import door, forks
from common.parallel.mesh import Axis, Layout, Mesh, distributed
from common.registry.forks import get_model, model_names
from common.registry.layout import decode_parts
from common.registry.settings import default_dtype
from common.video.causal import CausalStream, Grid, LocalLink, TimeSplit, lay_out
from common.video.decode import DecodePlan, VideoDecoder, decode_frames
from common.video.decode_planning import decode_memory, decode_plans
from common.video.rows import Messages, Rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(
    options: argparse.Namespace, device: torch.device, how: str = "streamed"
) -> tuple[VideoDecoder, tuple[int, int, int, int]]:
    """The decoder and its latents' (C, T, h, w). how `contiguous`: no weight in a GPU's own memory order."""
    torch.manual_seed(0)
    known = get_model(options.model)
    size = replace(known.default_size, width=options.width, height=options.height, num_frames=options.frames)
    model: VideoDecoder = forks.function(known, "decoder")(options.narrow)
    model = model.to(device, DTYPES[options.dtype]).eval()
    return model if how == "contiguous" else lay_out(model, device), (
        known.latents.channels,
        *known.latents.decoded(size),
    )


def build_peer(options: argparse.Namespace, device: torch.device) -> Callable[[torch.Tensor], Any]:
    model = forks.function(get_model(options.model), "their_decoder")(options.narrow)
    model.encoder = None
    model = model.to(device, DTYPES[options.dtype]).eval()
    return lambda z: model.decode(z).sample


class Meter:
    """Bytes on top of what there was at the start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        else:
            # 5 resets the kernel's record of the most that was resident.
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._resident("VmRSS")

    def peak(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.start
        return self._resident("VmHWM") - self.start

    @staticmethod
    def _resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(run: Callable[[], int], mesh: Mesh, repeat: int) -> dict[str, Any]:
    """Best seconds of `repeat` runs and the peak of them all; `run` returns the number of frames."""
    seconds, meter, frames, cpu = [], Meter(mesh.device), 0, time.process_time()
    for _ in range(repeat):
        if mesh.world.group is not None:
            torch.distributed.barrier()
        start = time.perf_counter()
        frames = run()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        seconds.append(time.perf_counter() - start)
    cpu = (time.process_time() - cpu) / repeat
    return {"seconds": min(seconds), "cpu": cpu, "peak": meter.peak(), "frames": frames}


def one_rank(pipe: Connection, rank: int, ranks: int, port: int, how: str, options: argparse.Namespace) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(options.threads)
    with distributed(Layout(ulysses=ranks), options.device) as mesh:
        if how == "peer":
            decode = build_peer(options, mesh.device)
            _, shape = build(options, torch.device("meta"))
        else:
            decoder, shape = build(options, mesh.device, how)
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(1, *shape, generator=generator).to(mesh.device, DTYPES[options.dtype])
        with torch.inference_mode():
            # What the libraries take once, at first use, is not the decode's.
            (decode if how == "peer" else decoder)(z[:, :, :1, :4, :4])
        if how == "peer":
            with torch.inference_mode():
                result = measure(lambda: decode(z).shape[2], mesh, options.repeat)
        else:
            chunk = shape[1] if how == "whole" else options.chunk
            parts = decode_parts(decoder.chunks(shape[1], chunk), shape[2], ranks)
            plan = DecodePlan("exact", chunk, parts=parts)
            split = TimeSplit(mesh.world)
            pieces = lambda: sum(len(p) for p in decode_frames(decoder, z, plan, split) if p is not None)  # noqa: E731
            result = measure(pieces, mesh, options.repeat)
            if how != "contiguous":
                result["estimate"] = decode_memory(decoder, shape, plan, ranks=ranks)
        pipe.send(result)


class Moved(TorchDispatchMode):
    """Bytes that operations read and write, by kind; within them, as a convolution's transforms, nothing is seen."""

    KINDS: ClassVar = {
        "convolutions": ("convolution", "conv3d", "conv2d"),
        "matmuls": ("linear", "mm", "addmm", "bmm"),
        "norms": ("group_norm", "native_group_norm"),
        "copies": ("copy_", "clone", "cat", "pad", "replication_pad3d", "constant_pad_nd", "_to_copy", "contiguous"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        known = {leaf.untyped_storage()._cdata for leaf in given}
        view = not func._schema.is_mutable and all(leaf.untyped_storage()._cdata in known for leaf in made)
        if not view and not name.startswith("empty") and not name.startswith("new_empty"):
            # What is copied over is not read.
            read = given[1:] if name == "copy_" else given
            kind = next((kind for kind, names in self.KINDS.items() if name in names), "elementwise")
            self.bytes[kind] += sum(leaf.nbytes for leaf in [*read, *made])
        return out


class Sent(LocalLink):
    """Counts the bytes and messages of a rank's tails; what is received was never sent here."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.messages = 0

    def send(self, key: Hashable, tail: torch.Tensor) -> None:
        self.bytes, self.messages = self.bytes + tail.nbytes, self.messages + 1

    def receive(self, key: Hashable, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        return x.new_empty(size)


class Exchanged(Messages):
    """Counts the bytes and messages that a rank sends those that share its chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.messages = 0

    def post(self, sent: Sequence[tuple[int, torch.Tensor]], awaited: Sequence[tuple[int, torch.Tensor]]) -> list[Any]:
        self.bytes, self.messages = self.bytes + sum(x.nbytes for _, x in sent), self.messages + len(sent)
        return []


@dataclass(frozen=True)
class Item:
    """What a rank does for its part of one chunk: FLOPs, bytes and messages of tails and of exchanges, bytes moved."""

    flops: int
    tails: tuple[int, int]
    exchanges: tuple[int, int]
    moved: Counter[str]


def items(decoder: VideoDecoder, shape: tuple[int, int, int, int], grid: Grid, chunk: int) -> list[list[Item]]:
    """By chunk and part; alike ones are counted once, without data."""
    lengths, made = decoder.chunks(shape[1], chunk), {}
    last, dtype = len(lengths) - 1, next(decoder.parameters()).dtype

    def item(k: int, part: int) -> Item:
        kind = (k == 0, k == last, lengths[k], grid.lengths[part], part == 0, part == len(grid.lengths) - 1)
        if kind not in made:
            link, messages = Sent(), Exchanged()
            rows = Rows(grid.lengths, part, messages=messages)
            z = torch.empty(1, shape[0], lengths[k], grid.lengths[part], shape[3], device="meta", dtype=dtype)
            with FlopCounterMode(display=False) as flops, Moved() as moved, torch.inference_mode():
                decoder(z, CausalStream(link, k == 0, k == last, rows))
            tails = (link.bytes, link.messages) if grid.groups > 1 else (0, 0)
            sent = messages.bytes, messages.messages
            made[kind] = Item(flops.get_total_flops(), tails, sent, moved.bytes)
        return made[kind]

    return [[item(k, part) for part in range(len(grid.lengths))] for k in range(len(lengths))]


def count(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One line for each number of ranks, by the plan that these would choose."""
    decoder, shape = build(options, torch.device("meta"))
    lines = []
    for ranks in options.ranks:
        plan = decode_plans(decoder, shape, ranks, "exact")[0]
        grid = Grid(Axis(ranks), shape[2], plan.parts)
        found = items(decoder, shape, grid, plan.chunk)
        # Ranks that share a chunk go through it together.
        together = [max(item.flops for item in parts) for parts in found]
        critical = max(sum(together[group :: grid.groups]) for group in range(grid.groups))
        by_rank: list[list[Item]] = [[] for _ in range(ranks)]
        for k, parts in enumerate(found):
            for part, item in enumerate(parts):
                by_rank[grid.owner(k, part)].append(item)
        busiest = max(by_rank, key=lambda own: sum(item.flops for item in own))
        line = {"how": "counted", "ranks": ranks, "groups x parts": f"{grid.groups} x {plan.parts}"}
        line["chunks"] = "+".join(map(str, decoder.chunks(shape[1], plan.chunk)))
        line["critical path"] = round(critical / sum(item.flops for parts in found for item in parts), 3)
        for name in ("tails", "exchanges"):
            sent = [[getattr(item, name) for item in own] for own in by_rank]
            line[f"{name} MB"] = round(max(sum(size for size, _ in own) for own in sent) / 1e6, 1)
            line[f"{name} messages"] = max(sum(number for _, number in own) for own in sent)
        moved = sum((item.moved for item in busiest), Counter())
        lines.append(line | {f"{kind} GB": round(size / 1e9, 1) for kind, size in sorted(moved.items())})
    return lines


def start(how: str, ranks: int, options: argparse.Namespace, context: BaseContext | None = None) -> dict[str, Any]:
    """One line of the table: the slowest rank's seconds, its processor time, the largest peak.

    context: how the ranks' processes start; default: spawned. RuntimeError when one of them ends without a result.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = context or multiprocessing.get_context("spawn")
    results, processes = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=one_rank, args=(theirs, rank, ranks, port, how, options))
        process.start()
        theirs.close()
        processes.append((process, mine))
    for process, pipe in processes:
        try:
            results.append(pipe.recv())
        except EOFError:
            for other, _ in processes:
                other.kill()
            raise RuntimeError(f"{how} on {ranks} ranks: one ended without a result; its error is above") from None
        process.join()
    return {
        "how": how,
        "ranks": ranks,
        "seconds": round(max(r["seconds"] for r in results), 2),
        "cpu seconds": round(max(r["cpu"] for r in results), 2),
        "peak MiB": round(max(r["peak"] for r in results) / 2**20, 1),
        "estimate MiB": round(max(r.get("estimate", 0) for r in results) / 2**20, 1) or None,
        "frames": results[0]["frames"],
    }


def wrong(options: argparse.Namespace) -> list[str]:
    """What is wrong with the options together; sizes are those of the decoder, of any model."""
    model = get_model(options.model)
    found = replace(model.rules, sizes=()).problems(options.width, options.height, options.frames)
    if not options.count and (problem := door.device_problem(options.device, max(options.ranks))) is not None:
        found.append(problem)
    for name in ("decoder", *(["their_decoder"] if options.peer else [])):
        try:
            forks.function(model, name)
        except ValueError as error:
            found.append(str(error))
    return found


def _arguments() -> argparse.Namespace:
    parser = door.Parser(__doc__)
    parser.add_argument("--model", type=forks.named, default=model_names()[0], help=", ".join(model_names()))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--frames", type=door.whole(100000), default=49)
    parser.add_argument("--height", type=door.whole(65536), default=96)
    parser.add_argument("--width", type=door.whole(65536), default=160)
    parser.add_argument(
        "--narrow", type=door.whole(1024), default=4, help="divide the model's channels; 1 is the real model"
    )
    parser.add_argument(
        "--chunk", type=door.whole(100000), default=1, help="latent frames at a time, where the model leaves a choice"
    )
    parser.add_argument("--ranks", type=door.ranks, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=door.whole(1000000), default=2)
    parser.add_argument("--threads", type=door.whole(4096), default=1, help="CPU threads of a rank")
    parser.add_argument("--peer", action="store_true", help="also diffusers' decoder")
    parser.add_argument("--count", action="store_true", help="bytes that are moved and shares of ranks, without data")
    parser.add_argument("--json", type=door.new_file, help="write the lines here too")
    options = parser.parse_args()
    if problems := wrong(options):
        parser.error("\n".join(problems))
    options.dtype = options.dtype or default_dtype(options.device, "bf16")
    return options


def main() -> None:
    options = _arguments()
    if options.count:
        for line in count(options):
            print("  ".join(f"{key} {value}" for key, value in line.items()))
        return
    cases = [("streamed", ranks) for ranks in options.ranks]
    if not forks.function(get_model(options.model), "decoder")(options.narrow).chunks_fixed:
        cases.append(("whole", 1))
    if options.peer:
        cases.append(("peer", 1))
    lines = []
    for how, ranks in cases:
        line = {"model": options.model, **start(how, ranks, options)}
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
        lines.append(line)
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "lines": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
