"""What Prometheus reads: the queue, seconds by stage, steps, memory, failures, restarts, answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from common.workers.group import Event, Health, Progress

STAGE_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
ANSWER_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.5, 2, 10, 60)


class Metrics:
    """Counters of one server, and what is looked up when they are read."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._stages = Histogram(
            "xdit_stage_seconds", "Time of a stage.", ("model", "stage"), buckets=STAGE_BUCKETS, registry=registry
        )
        self._steps = Counter(
            "xdit_steps", "Sampling steps that were done; its rate is steps a second.", ("model",), registry=registry
        )
        self._failures = Counter("xdit_failures", "Jobs that failed.", ("code",), registry=registry)
        self._answers = Histogram(
            "xdit_answer_seconds", "Time of an answer.", ("method", "status"), buckets=ANSWER_BUCKETS, registry=registry
        )

    def finished(self, model: str, seconds: Mapping[str, float]) -> None:
        for stage, value in seconds.items():
            self._stages.labels(model, stage).observe(value)

    def stepped(self, model: str, event: Event) -> None:
        """Counts what a sampling step's end tells."""
        if isinstance(event, Progress) and event.stage == "sampling" and event.step:
            self._steps.labels(model).inc()

    def failed(self, code: str) -> None:
        self._failures.labels(code).inc()

    def answered(self, method: str, status: int, seconds: float) -> None:
        self._answers.labels(method, str(status)).observe(seconds)

    def watch(self, counts: Callable[[], Mapping[str, int]], health: Callable[[], list[Health]]) -> None:
        """What is asked whenever the metrics are read."""
        self.registry.register(_Now(counts, health))

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _Now:
    def __init__(self, counts: Callable[[], Mapping[str, int]], health: Callable[[], list[Health]]) -> None:
        self._counts, self._health = counts, health

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counts = self._counts()
        queue = GaugeMetricFamily("xdit_queue_length", "Jobs that wait.")
        queue.add_metric([], counts.get("queued", 0))
        jobs = GaugeMetricFamily("xdit_jobs", "Jobs that are stored.", labels=["status"])
        for status in ("queued", "in_progress", "completed", "failed"):
            jobs.add_metric([status], counts.get(status, 0))
        states = GaugeMetricFamily("xdit_group_up", "1 for a group of ranks that can work.", labels=["group", "state"])
        memory = GaugeMetricFamily(
            "xdit_memory_bytes", "Of a rank's device, on a CPU of its process.", labels=["group", "device"]
        )
        restarts = GaugeMetricFamily(
            "xdit_restarts", "Times that a group was lost and started again.", labels=["group"]
        )
        for place, group in enumerate(self._health()):
            restarts.add_metric([str(place)], group.more.get("restarts", 0))
            states.add_metric([str(place), group.state], float(group.state in ("idle", "busy")))
            for rank in group.ranks:
                memory.add_metric([str(place), str(rank.device)], rank.memory)
        yield from (queue, jobs, states, memory, restarts)
