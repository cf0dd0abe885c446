"""`python estimating.py`: says of requests on stdin whether memory suffices, by the programs' own estimate.

A process beside the server, which itself never imports torch. Each message is its length and a pickle: in comes
(request, memory or None), out goes (problem or "", memory): what the machine had before the server's ranks took it.
"""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.memory.choice import FreeMemory
    from common.registry.request import Request

LENGTH = struct.Struct("<q")


def send(stream: IO[bytes], value: object) -> None:
    content = pickle.dumps(value)
    stream.write(LENGTH.pack(len(content)) + content)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """EOFError at the end of the stream."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    return pickle.loads(stream.read(LENGTH.unpack(head)[0]))


def problem(request: Request, memory: FreeMemory) -> str:
    """Why a request's first video cannot be made in this memory, in the command line's words; empty where it can."""
    from dataclasses import replace

    from common.memory.choice import choose_placement, estimator
    from common.memory.estimate import imagined
    from common.registry.forks import forks

    fork = next(fork for fork in forks() if fork.program == request.program)
    runtime = request.runtime
    if not fork.has("sampling") or runtime.offload is not None or runtime.shard_weights:
        return ""
    if request.source.demo is not None:
        folder = fork.demo_folder(request.source.demo)
        request = replace(request, source=replace(request.source, model_dir=folder))
    if runtime.max_bytes is not None:
        memory = replace(memory, free=min(memory.free, runtime.max_bytes))
    ranks = request.layout.ranks
    with imagined(request.layout, 0) as mesh:
        needs = estimator(fork, request, mesh)
        try:
            choose_placement(
                lambda placement, keep: needs.estimate(placement, keep, memory.free),
                memory,
                ranks,
                runtime.keep_loaded,
            )
        except ValueError as error:
            return str(error)
    return ""


def free_for(request: Request) -> FreeMemory | None:
    """Memory of this machine for each rank of a request; None where it is not known."""
    from common.memory.choice import FreeMemory
    from common.parallel.device_memory import host_memory

    host = host_memory() // request.layout.ranks
    if request.on_cpu:
        return FreeMemory(host, host, "cpu")
    # Not through PyTorch, which would take half a gigabyte of a GPU for as long as this process lives.
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return FreeMemory(min(int(line) for line in output.split()) << 20, host)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def main() -> None:
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    while True:
        try:
            request, memory = receive(sys.stdin.buffer)
        except EOFError:
            return
        memory = memory or free_for(request)
        try:
            message = "" if memory is None else problem(request, memory)
        except ValueError as error:
            message = str(error)
        send(answers, (message, memory))


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's modules are not top-level names
    main()
