"""The worker that is a process on this machine, worker.py.

It is told of a task in one line of JSON and answers with lines: `ready`; `begun`; `step`; `preview`; then
`done`, `failed` or `cancelled`. It ends when nobody writes to it any more, so it outlives no server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from contextlib import suppress
from typing import Any

from .interface import Hear, JobCancelled, JobFailed, Task, WorkerLost

log = logging.getLogger(__name__)

LOADING = 3600.0  # seconds that a bundle may take to load
LONGEST_LINE = 2**20  # bytes of an answer
ENDING = 5.0  # seconds that a process has to end in when it has closed its output
PACKAGE = __name__.partition(".")[0]


class ProcessWorker:
    """A worker that is a process of its own on this machine.

    bundle: its name; options: what Pipeline.from_bundle takes, as JSON, and `place`, the bundle's path; gpu:
    the one that it sees, None for all.
    """

    def __init__(self, bundle: str, options: dict[str, Any], gpu: str | None = None) -> None:
        self.bundle, self._options = bundle, options
        self._own = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self) -> None:
        """Starts the process and waits until the bundle is loaded. Raises WorkerLost."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"{PACKAGE}.runtime.workers.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
            start_new_session=True,  # a Ctrl-C is the server's, which drains
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | self._own,
        )
        self._tell(self._options)
        try:
            async with asyncio.timeout(LOADING):
                answer = await self._answer()
        except TimeoutError:
            answer = {"message": f"it did not load its bundle in {LOADING:g} seconds"}
        if answer.get("say") != "ready":
            await self.stop()
            raise WorkerLost(str(answer.get("message", "it did not come up")))
        log.info("a worker for %s is ready (process %d)", self.bundle, self._process.pid)

    async def make(self, task: Task, hear: Hear) -> dict[str, Any]:
        """See Worker."""
        self._tell(task.to_json())
        while True:
            answer = await self._answer()
            if answer.get("id") != task.id:
                continue
            said = answer.get("say")
            if said == "done":
                return {"warnings": answer["warnings"], "seconds": answer["seconds"]}
            if said == "cancelled":
                raise JobCancelled
            if said == "failed":
                raise JobFailed(str(answer["code"]), str(answer["message"]))
            hear(answer)

    async def gone(self) -> str:
        """See Worker."""
        if self._process is None:
            return "it is not running"
        return _how(await self._process.wait())

    def cancel(self, id: str) -> None:
        """See Worker."""
        with suppress(WorkerLost):
            self._tell({"do": "cancel", "id": id})

    def look(self, id: str) -> None:
        """See Worker."""
        with suppress(WorkerLost):
            self._tell({"do": "look", "id": id})

    async def stop(self) -> None:
        """See Worker."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    def _tell(self, value: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None or self._process.returncode is not None:
            raise WorkerLost("it is not running")
        with suppress(ConnectionError):  # the answer, which does not come, says so
            self._process.stdin.write(json.dumps(value).encode() + b"\n")

    async def _answer(self) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdout is None:
            raise WorkerLost("it is not running")
        try:
            line = await process.stdout.readline()
            if line.endswith(b"\n"):
                answer = json.loads(line)
                assert isinstance(answer, dict)
                return answer
        except ValueError:  # a line without end, or none of JSON
            line = b""
        try:
            raise WorkerLost(_how(await asyncio.wait_for(process.wait(), ENDING)))
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            raise WorkerLost(_how(await process.wait())) from None


def _how(code: int) -> str:
    return f"the worker's process ended ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
