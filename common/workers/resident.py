"""A resident rank: connected once, it makes one job's video after another and keeps its models in between."""

from __future__ import annotations

import importlib
import os
import pickle
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from common.registry.request import Request, WrongUse, as_wrong_use
from common.run.rank import resolved, try_connections
from common.system.environment import Process
from common.system.failure import describe
from common.system.host import allocator_default, bind_to_gpu, resident_bytes
from common.system.progress import Report
from common.system.stopping import Abandoned
from common.workers.agreement import Agreement
from common.workers.orders import Hello, Leave, Message, Order

if TYPE_CHECKING:
    import torch.distributed as dist

    from common.parallel.mesh import Mesh, ModelCache

MOST_PLACED = 64
"""Kinds of requests of which it is remembered where their weights went."""


class Tell(Protocol):
    """Sends whoever watches over the rank a message; surely: not to be lost."""

    def __call__(self, message: dict[str, Any], surely: bool = False) -> None: ...


@dataclass(frozen=True)
class _Place:
    """What the groups of processes were made for; another job with the same takes them over."""

    layout: Any
    device: str
    timeout: float


class Resident:
    """One rank between its start and its end. tell: to whoever watches over it; see `common.workers.orders`."""

    def __init__(self, process: Process, hello: Hello, tell: Tell) -> None:
        self.process, self.hello, self.tell = process, hello, tell
        self._cancelled_jobs: set[str] = set()
        self._mesh: Mesh | None = None
        self._place: _Place | None = None
        self._side: dist.ProcessGroup | None = None
        self._broken = False
        self._loadings = 0
        self._placements: dict[Any, Any] = {}

    def serve(self, orders: Iterable[Message]) -> int:
        """Until an order of None, or the end of the orders; returns the exit status. orders: may block; read by a
        thread of its own, since a job can be told to end while it runs."""
        queue: SimpleQueue[Order | None] = SimpleQueue()
        threading.Thread(target=self._listen, args=(orders, queue), daemon=True).start()
        try:
            self._meet()
        except Exception as error:
            self._failed(error, "starting", 1)
            return 1
        self.tell({"ready": True}, surely=True)
        while (order := queue.get()) is not None:
            self._run(order)
        return 0

    def _listen(self, orders: Iterable[Message], queue: SimpleQueue[Order | None]) -> None:
        for message in orders:
            if isinstance(message, Leave):
                self._cancelled_jobs.add(message.job)
            elif isinstance(message, Order):
                # What this rank was asked to leave has ended everywhere; it may hear so after the others have left.
                self._cancelled_jobs.clear()
                queue.put(message)
            elif message is None:
                break
        queue.put(None)

    def _meet(self) -> None:
        if not self.hello.on_cpu:  # before torch starts its threads and CUDA reads its settings
            os.environ.update(allocator_default(os.environ))
            bind_to_gpu(self.process.local_rank)
        from common.parallel.mesh import meet

        self._store = meet(self.hello.timeout)

    def _run(self, order: Order) -> None:
        report = _Told(self.tell, self.process.rank == 0)
        ending, seconds = "failed", dict[str, float]()
        try:
            self._make(order, report)
            ending = "finished"
            for record in report.records:
                seconds[record.name] = seconds.get(record.name, 0.0) + record.seconds
        except Abandoned as error:
            ending = "cancelled"
            unread = error.unread
        except Exception as error:
            self._failed(error, report.where, 2 if isinstance(error, WrongUse) else 1)
        # Here nothing holds the frames of what was left any more, and so none of its tensors. No collection of garbage:
        # it goes through all that PyTorch has imported, for a second, and the next job waits.
        del report
        if ending == "cancelled":
            self._settle(unread)
        elif ending == "failed":
            self._drop()
        self.tell({"ended": ending, "job": order.job, "seconds": seconds, **self._standing()}, surely=True)

    def _make(self, order: Order, report: _Told) -> None:
        fork = importlib.import_module(f"{order.package}.fork").FORK
        generate = getattr(importlib.import_module(order.module), order.name)
        request: Request = pickle.loads(order.request)
        with as_wrong_use():
            mesh = self._connected(order, request, report)
            report.device = mesh.device
            agreement = Agreement(self._side, lambda: order.job in self._cancelled_jobs)
            report.pause = partial(_pause, report, agreement)
            request = self._with_placement(fork, request, order, mesh, report)
        generate(request, mesh, report)
        agreement.close()

    def _connected(self, order: Order, request: Request, report: Report) -> Mesh:
        """This rank's mesh for a request: the one that is there, where it has the same layout. Collective."""
        from torch.distributed import PrefixStore

        from common.parallel.mesh import ModelCache, distributed, side_group, take_down

        place = _Place(request.layout, str(request.runtime.device), request.timeout)
        if self._mesh is not None and place == self._place and not order.fresh:
            return self._mesh
        if self._mesh is not None:
            before, self._mesh, self._side = self._mesh, None, None
            self._forget(before.cache)
            take_down(before, broken=order.fresh)
            del before
        with report.stage("starting", quiet=True):
            store = self._store and PrefixStore(f"mesh-{order.number}", self._store)
            mesh = distributed(request.layout, request.runtime.device, request.timeout, store)
        try_connections(mesh, request, report, lambda error: self._failed(error, report.where, 1))
        self._side = side_group(mesh, request.timeout)
        self._mesh, self._place = replace(mesh, cache=ModelCache()), place
        return self._mesh

    def _with_placement(self, fork: Any, request: Request, order: Order, mesh: Mesh, report: Report) -> Request:
        """As `common.run.rank.resolved`, which takes a second, once for requests of one kind."""
        runtime, video = request.runtime, request.videos[0]
        if order.keep and runtime.offload is None and not runtime.shard_weights:
            request = replace(request, runtime=replace(runtime, keep_loaded=True))
        how = (request.runtime, request.layout, request.decode)
        kind = (request.program, request.source, *how, video.sampling, request.guided(video))
        if kind not in self._placements or not request.sampled:
            request = resolved(fork, request, mesh, self.process, report)
            if len(self._placements) >= MOST_PLACED:
                self._placements.clear()
            self._placements[kind] = request.source, request.runtime
            return request
        source, runtime = self._placements[kind]
        return replace(request, source=source, runtime=runtime)

    def _settle(self, unread: bool) -> None:
        """After a job that all ranks left together: they are in step, and the models may stay. Collective."""
        import torch

        from common.parallel.mesh import with_new_edges

        if self._mesh is not None and self._mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        if unread and self._mesh is not None and self._place is not None:
            self._mesh = with_new_edges(self._mesh, self._place.timeout)

    def _drop(self) -> None:
        """After an error: whatever takes memory goes. The next order makes the groups of processes anew."""
        if self._mesh is not None:
            self._forget(self._mesh.cache)
        self._placements.clear()

    def _forget(self, cache: ModelCache | None) -> None:
        from common.parallel.device_memory import release_memory

        if cache is not None:
            self._loadings += cache.loadings
            cache.loadings = 0
            cache.of(None)
        release_memory()

    def _failed(self, error: BaseException, where: str, status: int) -> None:
        failure = describe(error, self.process.rank, where, status)
        self.tell({"failure": failure.as_dict()}, surely=True)

    def _standing(self) -> dict[str, Any]:
        cache, on_gpu = self._mesh and self._mesh.cache, self._mesh is not None and self._mesh.device.type == "cuda"
        memory = resident_bytes()
        if on_gpu and self._mesh is not None:
            import torch

            memory = torch.cuda.memory_allocated(self._mesh.device)
        models = sorted(cache.models) if cache else []
        return {"memory": memory, "models": models, "loadings": self._loadings + (cache.loadings if cache else 0)}


class _Told(Report):
    """A report that goes to whoever watches over the rank. Only the first rank has words for the user."""

    def __init__(self, tell: Tell, speaks: bool) -> None:
        super().__init__(tell=self._at)
        self._line, self._speaks = tell, speaks

    def _at(self, where: str) -> None:
        self._line({"stage": where} | ({"at": self.standing} if self._speaks else {}))

    def last_step(self) -> None:
        """Tell of a stage's last step; where the run is, which is told at each change, stays the same with it."""
        if self.standing is not None and self.standing[2] == self.standing[3] > 0:
            self._at(self.where)

    def _say(self, text: str, warning: bool) -> None:
        if self._speaks:
            self._line({"note": text, "warning": warning})


def _pause(report: _Told, agreement: Agreement) -> None:
    report.last_step()
    agreement.ask(report.standing and report.standing[0])
