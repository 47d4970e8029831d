"""Who is told when a job changes: streams that are open, and whoever waits for its end."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .jobs import Job

QUEUE = ("", "queue")  # told to those who listen to an owner: jobs have another place in the queue


class Changes:
    """What has changed since it was last taken: job and "status", "step" or "preview", in that order, each
    once. Whoever takes it looks at the jobs as they are then, so a slow stream misses only what is past."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], None] = {}
        self._some = asyncio.Event()

    def put(self, job: str, what: str) -> None:
        """Called by Events."""
        self._found[job, what] = None
        self._some.set()

    async def take(self) -> list[tuple[str, str]]:
        """Waits until there is something."""
        await self._some.wait()
        self._some.clear()
        found, self._found = self._found, {}
        return list(found)


class Events:
    """Changes of jobs, as they happen, to any number of listeners. Of one event loop."""

    def __init__(self) -> None:
        self._of_job: defaultdict[str, list[Changes]] = defaultdict(list)
        self._of_end: defaultdict[str, list[Changes]] = defaultdict(list)
        self._of_owner: defaultdict[str, list[Changes]] = defaultdict(list)

    def tell(self, job: Job, what: str) -> None:
        """what: "status", "step" or "preview"."""
        ends = self._of_end.get(job.id, ()) if what == "status" else ()
        for changes in (*self._of_job.get(job.id, ()), *ends, *self._of_owner.get(job.owner, ())):
            changes.put(job.id, what)

    def tell_moved(self, waits: Callable[[str], bool], has: Callable[[str], bool]) -> None:
        """Jobs have another place in the queue: those whose id `waits`, of the owners that `has` tells."""
        for id in filter(waits, self._of_job):
            for changes in self._of_job[id]:
                changes.put(id, "status")
        for owner in filter(has, self._of_owner):
            for changes in self._of_owner[owner]:
                changes.put(*QUEUE)

    def watched(self, job: Job) -> bool:
        """Whether anybody looks at what becomes of a job."""
        return job.owner in self._of_owner or job.id in self._of_job

    @contextmanager
    def of(self, job: str, watching: bool = True) -> Iterator[Changes]:
        """What is told of a job from here on. watching: not only for its end."""
        with _listening(self._of_job if watching else self._of_end, job) as changes:
            yield changes

    @contextmanager
    def of_owner(self, owner: str) -> Iterator[Changes]:
        """What is told of all jobs of an owner from here on, new ones, too."""
        with _listening(self._of_owner, owner) as changes:
            yield changes


@contextmanager
def _listening(listeners: defaultdict[str, list[Changes]], name: str) -> Iterator[Changes]:
    changes = Changes()
    listeners[name].append(changes)
    try:
        yield changes
    finally:
        listeners[name].remove(changes)
        if not listeners[name]:
            del listeners[name]
