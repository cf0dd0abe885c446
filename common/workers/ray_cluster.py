"""A Ray cluster before a group is on it: whether one answers, what it has, this process's connection. No torch here.

Ray waits for a cluster that does not answer without an end, in calls that nothing interrupts, and fills the screen
meanwhile. So a process that can be ended asks first, and calls are left alone that take too long.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from common.system.extras import install
from common.system.stopping import SIGNALS
from common.workers.group import GroupError

T = TypeVar("T")
ADDRESS = "RAY_ADDRESS"
CONNECT_SECONDS = 5.0
SIGACTION_BYTES = 256
"""More than the system's struct has."""
ANSWER_SECONDS = 15.0
"""For a process to import Ray and to be answered."""
START = "start one with `ray start --head`, or say --ray-address HOST:PORT of one that runs"
_ASK = """
import json, sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
    answer = {"has": ray.cluster_resources()}
except Exception as error:
    answer = {"error": " ".join(str(error).split()) or type(error).__name__, "none": isinstance(error, ConnectionError)}
print(json.dumps(answer))
"""


def ray_module() -> Any:
    """The package. GroupError, with what installs it, where it is not there."""
    try:
        import ray
    except ImportError:
        raise GroupError(f"worker groups on Ray need the package ray: {install('ray')}") from None
    return ray


def address_of(address: str | None) -> str:
    """Where the cluster is: as given; for None or `auto` what RAY_ADDRESS says, else the one on this machine."""
    return address if address not in (None, "auto") else os.environ.get(ADDRESS) or "auto"


def check(address: str | None, on_cpu: bool, ranks: int) -> None:
    """Whether a cluster is there that has so many CPUs or GPUs, free or not. GroupError says what to do."""
    ray_module()
    address = address_of(address)
    reachable(address)
    kind = "CPU" if on_cpu else "GPU"
    there = int(_resources(address).get(kind, 0))
    if there >= ranks:
        return
    if not there:
        raise GroupError(f"{named(address)} has no {kind}s{'' if on_cpu else '; say --device cpu'}")
    few = f"{named(address)} has {there} {kind}{'' if there == 1 else 's'} for {ranks} ranks"
    raise GroupError(f"{few}; ask for fewer with --gpus, or start Ray on more machines")


def named(address: str) -> str:
    """A cluster, in a line for the user."""
    return "the Ray cluster of this machine" if address == "auto" else f"the Ray cluster at {address}"


def reachable(address: str) -> None:
    """GroupError where nothing takes a connection at the address. Of `auto` Ray itself knows at once."""
    if address == "auto":
        return
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = place.hostname, place.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise GroupError(f"no Ray cluster at {address!r}: that is no HOST:PORT; {START}")
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        why = "nothing answers" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
        raise GroupError(f"no Ray cluster at {address}: {why}; {START}") from None


def _resources(address: str) -> dict[str, float]:
    """What the cluster has, by kind."""
    try:
        command = [sys.executable, "-c", _ASK, address]
        process = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=ANSWER_SECONDS)
        answer = json.loads(process.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise GroupError(f"what is at {address} does not answer as a Ray cluster does; {START}") from None
    except (IndexError, ValueError):
        raise GroupError(f"{named(address)} cannot be asked: Ray ended with {process.returncode}") from None
    if "error" in answer:
        why = f"none runs on this machine; {START}" if answer["none"] and address == "auto" else answer["error"][:300]
        raise GroupError(f"no Ray cluster at {address}: {why}")
    has: dict[str, float] = answer["has"]
    return has


def connect(ray: Any, address: str) -> None:
    """This process's connection, if there is none yet. GroupError.

    Where the head of a connected cluster is gone, Ray ends this process a minute later, `ray.shutdown` or not.
    """
    if ray.is_initialized():
        return reachable(ray.get_runtime_context().gcs_address)
    reachable(address)
    try:
        with _as_a_guest():
            within(lambda: ray.init(address=address, log_to_driver=False, configure_logging=False), address)
    except (ConnectionError, ValueError) as error:
        raise GroupError(f"no Ray cluster at {address}: {' '.join(str(error).split())[:300]}") from None


def within(call: Callable[[], T], address: str) -> T:
    """What a call of Ray's returns or raises. GroupError when that takes too long: it is left to itself then."""
    answers: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer, error = answers.get(timeout=ANSWER_SECONDS)
    except Empty:
        raise GroupError(f"{named(address)} does not answer") from None
    if error is not None:
        raise error
    return cast(T, answer)


@contextmanager
def _as_a_guest() -> Iterator[None]:
    """Inside, Ray sets what it likes for the signals that end this process; afterwards they do what they did before.

    By Python's own means that could be put right in the main thread alone, and groups start in others. Ray's handler
    prints stacks as of a crash. Nor does Ray say that the thread is not the main one.
    """
    logger, libc = logging.getLogger("ray"), ctypes.CDLL(None)
    level = logger.level
    logger.setLevel(logging.ERROR)
    actions = {number: ctypes.create_string_buffer(SIGACTION_BYTES) for number in SIGNALS}
    for number, action in actions.items():
        libc.sigaction(int(number), None, action)
    try:
        yield
    finally:
        for number, action in actions.items():
            libc.sigaction(int(number), action, None)
        logger.setLevel(level)
