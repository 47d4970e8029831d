"""A process of our own that is told lines of JSON and answers with such lines.

It ends when nobody writes to it any more, so it outlives no one who started it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from .interface import WorkerLost

LONGEST_LINE = 2**20  # bytes of an answer
ENDING = 5.0  # seconds that a process has to end in when it has closed its output
PACKAGE = __name__.partition(".")[0]


class Lines:
    """Starts `python -m conceptmaster.MODULE`. Methods raise WorkerLost where it has ended.

    module: below the package; what: names it in errors; own: of its environment, beside this one's.
    """

    def __init__(self, module: str, what: str, own: Mapping[str, str]) -> None:
        self._module, self._what, self._own = module, what, own
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self) -> None:
        """Starts the process."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"{PACKAGE}.{self._module}",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
            start_new_session=True,  # a Ctrl-C is the server's, which drains
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | dict(self._own),
        )

    def tell(self, value: dict[str, Any]) -> None:
        """One line to it."""
        if self.pid is None or self._process is None or self._process.stdin is None:
            raise WorkerLost(f"{self._what} is not running")
        with suppress(ConnectionError):  # the answer, which does not come, says so
            self._process.stdin.write(json.dumps(value).encode() + b"\n")

    async def answer(self) -> dict[str, Any]:
        """The next line from it."""
        process = self._process
        if process is None or process.stdout is None:
            raise WorkerLost(f"{self._what} is not running")
        try:
            line = await process.stdout.readline()
            if line.endswith(b"\n"):
                answer = json.loads(line)
                assert isinstance(answer, dict)
                return answer
        except ValueError:  # a line without end, or none of JSON
            line = b""
        try:
            raise WorkerLost(self._how(await asyncio.wait_for(process.wait(), ENDING)))
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            raise WorkerLost(self._how(await process.wait())) from None

    async def ended(self) -> str:
        """Waits until it has ended; how, in one line."""
        if self._process is None:
            return f"{self._what} is not running"
        return self._how(await self._process.wait())

    async def close(self, patience: float) -> None:
        """Lets it end by itself for so many seconds, as it does when nobody writes to it; then ends it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), patience)
        await self.kill()

    async def kill(self) -> None:
        """Ends it, whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    def _how(self, code: int) -> str:
        return f"{self._what} ended ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
