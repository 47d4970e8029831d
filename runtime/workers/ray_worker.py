"""The server's side of workers on a Ray cluster. Ray itself runs in the gateway's process alone.

So its threads, its signals, and its habit of ending whoever loses its head never reach the server. When the
gateway dies, its workers are lost and their jobs go back; whichever starts first starts it anew.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .interface import Hear, Task, WorkerLost, last_word
from .lines import Lines

log = logging.getLogger(__name__)

# Ray asks whether it may report how it is used, and answers yes.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
CLOSING = 20.0  # seconds: a Ray of its own ends several processes


@dataclass(frozen=True)
class Needs:
    """What a node must have free for a worker."""

    cpus: float
    gpus: float


class Gateway:
    """The process that speaks with Ray, for all of its workers; started by the first one.

    address: of the cluster, as ray.init takes it, "local" for one of its own; cpus: that one's; verbose: what
    Ray writes is shown.
    """

    def __init__(self, address: str, cpus: int, verbose: bool = False) -> None:
        self._told = {"address": address, "cpus": cpus, "verbose": verbose}
        self._lines = Lines("runtime.workers.gateway", "the process that speaks with Ray", QUIET)
        self._hears: dict[int, Callable[[dict[str, Any]], None]] = {}
        self._numbers = itertools.count()
        self._starting = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return self._lines.pid

    def register(self, hear: Callable[[dict[str, Any]], None]) -> int:
        """A number for a worker, who hears what is said of it."""
        number = next(self._numbers)
        self._hears[number] = hear
        return number

    async def start(self) -> None:
        """Starts the process, unless it runs, and waits until it is in the cluster. Raises WorkerLost."""
        async with self._starting:
            if self._reading is not None and not self._reading.done():
                return
            await self._lines.kill()
            await self._lines.start()
            self._lines.tell(self._told)
            answer = await self._lines.answer()
            if answer["say"] != "joined":
                await self._lines.kill()
                raise WorkerLost(str(answer["message"]))
            self._reading = asyncio.create_task(self._read())

    def tell(self, value: dict[str, Any]) -> None:
        """One line to it. Raises WorkerLost."""
        self._lines.tell(value)

    async def close(self) -> None:
        """Ends it, and with it all workers, and a Ray of its own."""
        if self._reading is not None:
            self._reading.cancel()
        await self._lines.close(CLOSING)

    async def _read(self) -> None:
        while True:
            try:
                said = await self._lines.answer()
            except WorkerLost as error:
                for hear in self._hears.values():
                    hear({"say": "lost", "message": str(error)})
                return
            if (heard := self._hears.get(said.pop("worker"))) is not None:
                heard(said)


class RayWorker:
    """A worker on a node of a Ray cluster.

    bundle: its name; options: as of ProcessWorker; gateway: shared by all; needs: of a node.
    """

    def __init__(self, bundle: str, options: dict[str, Any], gateway: Gateway, needs: Needs) -> None:
        self.bundle, self._options, self._gateway = bundle, options, gateway
        self._needs = needs
        self._number = gateway.register(self._hear)
        self._life = 0  # rises with each start, so that what is said of an earlier one is not heard
        self._said = asyncio.Queue[dict[str, Any]]()
        self._lost = asyncio.Event()
        self._why = "it is not running"

    async def start(self) -> None:
        """Waits for a node with what it needs, and until the bundle is loaded there. Raises WorkerLost."""
        await self._gateway.start()
        self._life += 1
        self._said, self._lost = asyncio.Queue(), asyncio.Event()
        self._tell("start", bundle=self.bundle, options=self._options, needs=vars(self._needs))
        while (said := await self._answer())["say"] != "ready":
            if said["say"] == "waits":
                log.warning("a worker for %s waits: %s", self.bundle, said["message"])
        log.info("a worker for %s is ready on %s", self.bundle, said["where"])

    async def make(self, task: Task, hear: Hear) -> dict[str, Any]:
        """See Worker."""
        if self._lost.is_set():
            raise WorkerLost(self._why)
        self._tell("make", task=task.to_json())
        return await last_word(self._answer, task, hear)

    async def gone(self) -> str:
        """See Worker."""
        await self._lost.wait()
        return self._why

    def cancel(self, id: str) -> None:
        """See Worker."""
        with suppress(WorkerLost):
            self._tell("cancel", id=id)

    def look(self, id: str) -> None:
        """See Worker."""
        with suppress(WorkerLost):
            self._tell("look", id=id)

    async def stop(self) -> None:
        """See Worker."""
        with suppress(WorkerLost):
            self._tell("stop")
        self._life += 1

    def _tell(self, do: str, **more: Any) -> None:
        self._gateway.tell({"worker": self._number, "life": self._life, "do": do, **more})

    def _hear(self, said: dict[str, Any]) -> None:
        if said.get("life", self._life) != self._life:
            return
        if said["say"] == "lost":
            self._why = str(said["message"])
            self._lost.set()
        self._said.put_nowait(said)

    async def _answer(self) -> dict[str, Any]:
        said = await self._said.get()
        if said["say"] == "lost":
            raise WorkerLost(str(said["message"]))
        return said
