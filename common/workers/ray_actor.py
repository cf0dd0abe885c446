"""A rank inside a Ray actor: the same resident rank as anywhere, its line to the group a queue that the group empties.

What a rank leaves of each step stays in the actor until the group takes it, which it does all the time: a node that
goes takes a step or two with it.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from common.registry.request import Request
from common.run.children import free_port
from common.run.states import At, Slots
from common.system.environment import this_process
from common.workers.orders import Hello, Message, Order
from common.workers.resident import Resident

MOST_AT_ONCE = 256

Part = tuple[At, int, bytes]
"""Of a state: where it is, of how many steps, this rank's tensors."""


class RankActor:
    """One rank. Its methods are called from several of the actor's threads."""

    def __init__(self) -> None:
        self._outbox: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._orders: SimpleQueue[Message] = SimpleQueue()
        self._slots = Slots.create()
        self._sent_states: set[At] = set()

    def place(self) -> tuple[str, int, int]:
        """The machine's address, a port that is free there, and the process's id."""
        import ray

        return ray.util.get_node_ip_address(), free_port(), os.getpid()

    def begin(self, env: Mapping[str, str], hello: Hello, folder: str) -> None:
        """Meet the other ranks and wait for orders. env: as torchrun sets it. folder: to be the current one."""
        os.environ.update(env)
        with suppress(OSError):  # of a machine that has no such folder
            os.chdir(folder)
        sys.path += [path for path in hello.path if path not in sys.path]
        threading.Thread(target=self._serve, args=(hello,), daemon=True).start()

    def _serve(self, hello: Hello) -> None:
        status = Resident(this_process(), hello, self._tell).serve(iter(self._orders.get, None))
        self._tell({"left": status})

    def send(self, message: Message) -> None:
        """An order, or what else a group sends."""
        if isinstance(message, Order):
            request: Request = pickle.loads(message.request)
            if request.slots:  # those are descriptors of the group's own process
                self._slots.clear()
                self._sent_states.clear()
                request = replace(request, slots=(self._slots.descriptors,) * request.layout.sequence)
                message = replace(message, request=pickle.dumps(request))
        self._orders.put(message)

    def hear(self, seconds: float) -> tuple[list[dict[str, Any]], list[Part]]:
        """What the rank has said and kept since; waits so long at most for the first of these."""
        messages = self._waiting(seconds)
        parts = []
        for at, steps in sorted(self._slots.held().items()):
            if at not in self._sent_states and (part := self._slots.read(at)) is not None:
                self._sent_states.add(at)
                parts.append((at, steps, part))
        return messages, parts

    def _waiting(self, seconds: float) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        try:
            messages.append(self._outbox.get(timeout=seconds))
            while len(messages) < MOST_AT_ONCE:
                messages.append(self._outbox.get_nowait())
        except Empty:
            pass
        return messages

    def _tell(self, message: dict[str, Any], surely: bool = False) -> None:
        self._outbox.put(message)
