"""The worker that is a process on this machine, worker.py.

It is told of a task in one line of JSON and answers with lines: `ready`; `begun`; `step`; `preview`; then
`done`, `failed` or `cancelled`. It ends when nobody writes to it any more, so it outlives no server.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from .interface import Hear, Task, WorkerLost, last_word
from .lines import Lines

log = logging.getLogger(__name__)

LOADING = 3600.0  # seconds that a bundle may take to load


class ProcessWorker:
    """A worker that is a process of its own on this machine.

    bundle: its name; options: what Pipeline.from_bundle takes, as JSON, and `place`, the bundle's path; gpu:
    the one that it sees, None for all.
    """

    def __init__(self, bundle: str, options: dict[str, Any], gpu: str | None = None) -> None:
        self.bundle, self._options = bundle, options
        own = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        self._lines = Lines("runtime.workers.worker", "the worker's process", own)

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return self._lines.pid

    async def start(self) -> None:
        """Starts the process and waits until the bundle is loaded. Raises WorkerLost."""
        await self._lines.start()
        self._lines.tell(self._options)
        try:
            async with asyncio.timeout(LOADING):
                answer = await self._lines.answer()
        except TimeoutError:
            answer = {"message": f"it did not load its bundle in {LOADING:g} seconds"}
        if answer.get("say") != "ready":
            await self.stop()
            raise WorkerLost(str(answer.get("message", "it did not come up")))
        log.info("a worker for %s is ready (process %d)", self.bundle, self.pid)

    async def make(self, task: Task, hear: Hear) -> dict[str, Any]:
        """See Worker."""
        self._lines.tell(task.to_json())
        return await last_word(self._lines.answer, task, hear)

    async def gone(self) -> str:
        """See Worker."""
        return await self._lines.ended()

    def cancel(self, id: str) -> None:
        """See Worker."""
        with suppress(WorkerLost):
            self._lines.tell({"do": "cancel", "id": id})

    def look(self, id: str) -> None:
        """See Worker."""
        with suppress(WorkerLost):
            self._lines.tell({"do": "look", "id": id})

    async def stop(self) -> None:
        """See Worker."""
        await self._lines.kill()
