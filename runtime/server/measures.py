"""What Prometheus asks for. The only file that imports prometheus_client."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from .jobs import CANCELLED, COMPLETED, FAILED

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Measures:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        name = "conceptmaster"
        self._ended = Counter(f"{name}_jobs", "Jobs that ended, by how", ["status"], registry=self._registry)
        for status in (COMPLETED, FAILED, CANCELLED):
            self._ended.labels(status)
        self._refused = Counter(f"{name}_refused", "Jobs that a full queue refused", registry=self._registry)
        self._waiting = Gauge(f"{name}_queue_length", "Jobs that wait", registry=self._registry)
        self._workers = Gauge(f"{name}_workers_ready", "Workers that are loaded", registry=self._registry)
        wanted = "Workers that there should be: one for each job, within the bounds"
        self._wanted = Gauge(f"{name}_workers_wanted", wanted, registry=self._registry)
        waited = "Seconds from POST to the first computation"
        self._waited = Histogram(
            f"{name}_queue_wait_seconds", waited, buckets=SECONDS, registry=self._registry
        )
        made = "Seconds from the first computation to the files"
        self._made = Histogram(f"{name}_make_seconds", made, buckets=SECONDS, registry=self._registry)

    def watch(self, waiting: Callable[[], int]) -> None:
        """Where the length of the queue is asked for."""
        self._waiting.set_function(waiting)

    def ended(self, status: str) -> None:
        """A job ended."""
        self._ended.labels(status).inc()

    def refused(self) -> None:
        """A job was not taken."""
        self._refused.inc()

    def waited(self, seconds: float) -> None:
        """A job was begun after so long."""
        self._waited.observe(seconds)

    def made(self, seconds: float) -> None:
        """A job was finished so long after it was begun."""
        self._made.observe(seconds)

    def workers(self, ready: int, wanted: int) -> None:
        """So many workers are loaded, and so many there should be."""
        self._workers.set(ready)
        self._wanted.set(wanted)

    def text(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self._registry)
