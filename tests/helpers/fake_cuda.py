"""`torch.cuda` answered for a machine of GPUs that are not there, for fake tensors on `cuda:N` on a CPU build.

    with fake_cuda(capability=(9, 0), devices=8) as machine:
        x = torch.empty(4, 4, device="cuda:3")      # a fake tensor: shape, stride, dtype and device, no data
    machine.synchronised                            # how often the host waited for a device

Nothing is computed: PyTorch's meta kernels say what each operation would give. What depends on data (`item`, `nonzero`)
raises, as does a tensor of the wrong device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

GIB = 2**30
CUDNN = 91900
"""The version of cuDNN that there is, as PyTorch tells it: 9.19."""


class Event:
    """What `Stream.record_event` gives; it knows its device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device


class Stream:
    """A CUDA stream by name only: it writes down what it is asked to wait for."""

    def __init__(self, machine: Machine, device: torch.device | str | None = None) -> None:
        self.machine = machine
        self.device = torch.device(device or machine.device)

    def wait_stream(self, other: Stream) -> None:
        self.machine.tell("wait_stream", self, other)

    def wait_event(self, event: Event) -> None:
        self.machine.tell("wait_event", self, event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.device)
        self.machine.tell("record_event", self, event)
        return event

    def synchronize(self) -> None:
        self.machine.synchronised += 1
        self.machine.tell("synchronize", self, None)


@dataclass
class Machine:
    """What the fake machine was and what was asked of it.

    free, total: bytes of each device, as `mem_get_info` answers. synchronised: times the host waited for a device.
    emptied: calls of `empty_cache`. events: what streams were asked, in order, as (name, stream, other); the host's
    wait for a whole device has no stream. listeners: called with each event.
    """

    capability: tuple[int, int] = (9, 0)
    devices: int = 8
    free: int = 79 * GIB
    total: int = 80 * GIB
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    synchronised: int = 0
    emptied: int = 0
    events: list[tuple[str, Any, Any]] = field(default_factory=list)
    listeners: list[Callable[[str, Any, Any], None]] = field(default_factory=list)
    streams: dict[torch.device, Stream] = field(default_factory=dict)
    """The current one of each device."""

    def tell(self, name: str, stream: Any, other: Any) -> None:
        self.events.append((name, stream, other))
        for listener in self.listeners:
            listener(name, stream, other)

    def current_stream(self, device: Any = None) -> Stream:
        if device is None and (current := self.streams.get(self.device)) is not None:
            return current  # asked for at every operation
        key = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or self.device)
        key = self.device if key.index is None else key
        return self.streams.setdefault(key, Stream(self, key))

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Work inside goes to this stream of its device."""
        before = self.current_stream(stream.device)
        self.streams[stream.device] = stream
        try:
            yield
        finally:
            self.streams[stream.device] = before

    def set_device(self, device: torch.device | int | str) -> None:
        index = device if isinstance(device, int) else torch.device(device).index or 0
        if not 0 <= index < self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        self.device = torch.device("cuda", index)

    def synchronize(self, device: Any = None) -> None:
        self.synchronised += 1
        self.tell("synchronize", None, None)

    def empty_cache(self) -> None:
        self.emptied += 1

    def answers(self) -> dict[str, Any]:
        """Names in `torch.cuda` and what stands for them."""
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: self.devices,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_name": lambda device=None: "a fake GPU",
            "set_device": self.set_device,
            "current_device": lambda: self.device.index,
            "synchronize": self.synchronize,
            "mem_get_info": lambda device=None: (self.free, self.total),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "empty_cache": self.empty_cache,
            "Stream": lambda device=None, **_: Stream(self, device),
            "current_stream": self.current_stream,
            "stream": self.stream,
        }


@contextmanager
def fake_cuda(
    capability: tuple[int, int] = (9, 0),
    devices: int = 8,
    free: int = 79 * GIB,
    tensors: bool = True,
    real_inputs: bool = False,
) -> Iterator[Machine]:
    """A machine of `devices` GPUs of one compute capability, with `free` bytes each, until it is left.

    tensors: whether tensors made inside are fake; without it only `torch.cuda` is answered. real_inputs: whether real
    tensors may meet them (a table that was made outside); by default that is an error.
    """
    machine = Machine(capability, devices, free)
    _lend_guard()
    with ExitStack() as stack:
        for name, answer in machine.answers().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.backends.cudnn, "is_available", lambda: True))
        stack.enter_context(mock.patch.object(torch.backends.cudnn, "version", lambda: CUDNN))
        # Making the first fake tensor of a device would initialise CUDA.
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        # Else data given as lists would be put on the device before anything here could see it.
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        if tensors:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=real_inputs))
        yield machine


def _lend_guard() -> None:
    """Give the device type CUDA the meta device's guard, which does nothing, where this PyTorch was built without CUDA.

    Indexing and other operations written in C++ ask for the guard of a tensor's device and abort without one. Python
    has no way to register one, so the slot in the table of guards, an array of pointers by device type, is filled.
    """
    # c10::DeviceType: CUDA is 1, meta 14.
    cuda, meta = 1, 14
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if not guards[cuda]:
        guards[cuda] = guards[meta]
