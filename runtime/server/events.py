"""Who is told when a job changes: streams that are open, and whoever waits for its end."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

MOST_WAITING = 256  # changes that a stream has not taken yet; then it only learns the last


class Events:
    """Changes of jobs, as they happen, to any number of listeners. Of one event loop."""

    def __init__(self) -> None:
        self._listeners: defaultdict[str, list[asyncio.Queue[str]]] = defaultdict(list)

    def tell(self, job: str, what: str) -> None:
        """what: "status", "step" or "preview"."""
        for queue in self._listeners.get(job, ()):
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(what)

    @contextmanager
    def of(self, job: str) -> Iterator[asyncio.Queue[str]]:
        """A queue of what is told of a job from here on."""
        queue: asyncio.Queue[str] = asyncio.Queue(MOST_WAITING)
        self._listeners[job].append(queue)
        try:
            yield queue
        finally:
            self._listeners[job].remove(queue)
            if not self._listeners[job]:
                del self._listeners[job]
