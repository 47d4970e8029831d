"""Nodes whose GPUs make jobs by the clock alone, and fail: what stands in the place of a cluster in
cluster_simulation.py.

A node fails as a whole, takes along what is made on it, and comes back after REPAIR; its workers then load
their bundle anew. Every draw is by the seed and the node's name, so that nothing else moves it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

from conceptmaster.runtime.workers.interface import Hear, JobCancelled, Task, WorkerLost

GPUS = 8  # of a node
REPAIR = 900.0  # seconds until a node that has failed is back: chosen
LOADING = 60.0  # seconds in which a worker loads its bundle: chosen


class Watch:
    """What the simulation sees of jobs, and the processor's seconds that it takes itself."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.failures = self.deaths = 0  # of nodes; of workers while they made something
        self.own = 0.0


class Node:
    """Up to GPUS workers that live and die together. mtbf: seconds between two failures of one GPU."""

    def __init__(self, name: str, mtbf: float, seed: int, watch: Watch) -> None:
        self.up = asyncio.Event()
        self.up.set()
        self.workers: list[SimulatedWorker] = []
        self._dice, self._mtbf, self._watch = random.Random(f"{seed} {name}"), mtbf, watch

    async def fail(self) -> None:
        """Now and then, without end."""
        while True:
            await asyncio.sleep(self._dice.expovariate(len(self.workers) / self._mtbf))
            self.up.clear()
            self._watch.failures += 1
            for worker in self.workers:
                worker.die()
            await asyncio.sleep(REPAIR)
            self.up.set()


class SimulatedWorker:
    """A Worker. A job's request says what it takes: `timings`, seconds until each step and until the end."""

    def __init__(self, bundle: str, node: Node, watch: Watch) -> None:
        self.bundle, self._node, self._watch = bundle, node, watch
        self._gone: asyncio.Future[str] | None = None
        self._pause: asyncio.Future[None] | None = None
        node.workers.append(self)

    def die(self) -> None:
        """With all that it does."""
        if self._gone is not None and not self._gone.done():
            self._gone.set_result("its node died")
        if self._pause is not None and not self._pause.done():
            self._pause.set_exception(WorkerLost("its node died"))

    async def start(self) -> None:
        """See Worker."""
        await self._node.up.wait()
        await self._wait(LOADING)
        self._gone = asyncio.get_running_loop().create_future()

    async def make(self, task: Task, hear: Hear) -> dict[str, Any]:
        """See Worker."""
        loop, watch = asyncio.get_running_loop(), self._watch
        watch.began.setdefault(task.id, loop.time())
        *steps, last = task.request["timings"]
        try:
            hear({"say": "begun", "id": task.id})
            for number, seconds in enumerate(steps, 1):
                await self._wait(seconds)
                hear({"say": "step", "id": task.id, "step": number, "steps": len(steps)})
            await self._wait(last)
        except WorkerLost:
            watch.deaths += 1
            raise
        own = time.thread_time()
        for name in ("video-0.mp4", "thumbnail-0.webp", "spritesheet-0.png"):
            (task.folder / name).touch()
        watch.ended[task.id] = loop.time()
        watch.own += time.thread_time() - own
        return {"warnings": [], "seconds": {"denoise": sum(steps), "decode": last}}

    async def gone(self) -> str:
        """See Worker."""
        if self._gone is None:
            return "it is not running"
        return await asyncio.shield(self._gone)

    def cancel(self, id: str) -> None:
        """See Worker."""
        if self._pause is not None and not self._pause.done():
            self._pause.set_exception(JobCancelled())

    def look(self, id: str) -> None:
        """See Worker."""

    async def stop(self) -> None:
        """See Worker."""
        self.die()

    async def _wait(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._pause = loop.create_future()
        timer = loop.call_later(seconds, _end, self._pause)
        try:
            await self._pause
        finally:
            timer.cancel()


def _end(pause: asyncio.Future[None]) -> None:
    if not pause.done():
        pause.set_result(None)


def nodes(bundle: str, gpus: int, mtbf: float, seed: int, watch: Watch) -> Sequence[Node]:
    """A bundle's, with a worker on each of so many GPUs."""
    found = []
    for first in range(0, gpus, GPUS):
        node = Node(f"{bundle} {first // GPUS}", mtbf, seed, watch)
        for _ in range(min(GPUS, gpus - first)):
            SimulatedWorker(bundle, node, watch)
        found.append(node)
    return found
