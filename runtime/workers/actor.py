"""What runs on a node of a Ray cluster: one worker's process, and its way to files there.

Imports no ray: the gateway makes an actor of this class, whose calls are answered over the network.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import ConceptMasterError
from .fetch import PIECE, Parcel, at_hand, fetch, sound
from .interface import PREVIEW, JobCancelled, JobFailed, Task, WorkerLost
from .process import ProcessWorker

Said = dict[str, Any]
"""As worker.py says it; files are {"say": "file", "name": …, "data": bytes}, in pieces, in order."""


class Actor:
    """Holds a ProcessWorker, which is started again as often as it dies. bundle: its name."""

    def __init__(self, bundle: str) -> None:
        self._bundle = bundle
        self._worker: ProcessWorker | None = None
        threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()

    async def where(self) -> str:
        """The node's name: said as soon as there is a node."""
        return socket.gethostname()

    async def start(self, options: dict[str, Any], parcel: Parcel, version: str, source: Any = None) -> Said:
        """Starts the worker's process: `ready`, `lost`, or `wanted` where the bundle is not here and there is
        no `source`, an actor of fetch.Source, to bring it from."""
        if version != __version__:
            return _lost(f"has conceptmaster {__version__}, the server {version}: install the same there")
        try:
            place = await asyncio.to_thread(at_hand, parcel)
            if place is not None:
                said = await self._open(options, place)
                if said["say"] == "ready" or await asyncio.to_thread(sound, place):
                    return said
            if source is None:
                return {"say": "wanted", "where": socket.gethostname()}

            async def read(name: str, start: int) -> bytes:
                return await source.read.remote(name, start)

            return await self._open(options, await fetch(parcel, read))
        except (ConceptMasterError, OSError) as error:
            why = f"{error.filename!r}: {error.strerror}" if isinstance(error, OSError) else error
            return _lost(f"cannot have the bundle: {why}")

    async def _open(self, options: dict[str, Any], place: Path) -> Said:
        await self.stop()
        self._worker = ProcessWorker(self._bundle, {**options, "place": str(place)})
        try:
            await self._worker.start()
        except WorkerLost as error:
            return _lost(f"says: {error}")
        return {"say": "ready"}

    async def gone(self) -> str:
        """See Worker."""
        assert self._worker is not None
        return await self._worker.gone()

    async def make(self, told: dict[str, Any], pictures: list[bytes]) -> AsyncIterator[Said]:
        """What is said of a task, and its files before its last word; its paths are another machine's."""
        assert self._worker is not None
        try:
            with tempfile.TemporaryDirectory(prefix="conceptmaster-") as name:
                task = await asyncio.to_thread(_task, told, pictures, Path(name))
                heard = asyncio.Queue[Said | None]()
                making = asyncio.create_task(self._worker.make(task, heard.put_nowait))
                making.add_done_callback(lambda _: heard.put_nowait(None))
                while (said := await heard.get()) is not None:
                    if said["say"] == "preview":
                        said = {**said, "data": (task.folder / PREVIEW).read_bytes()}
                    yield said
                made = making.result()
                for path in sorted(task.folder.iterdir()):
                    with path.open("rb") as file:
                        while data := file.read(PIECE):
                            yield {"say": "file", "name": path.name, "data": data}
                yield {"say": "done", **made}
        except JobCancelled:
            yield {"say": "cancelled"}
        except JobFailed as error:
            yield {"say": "failed", "code": error.code, "message": str(error)}
        except OSError as error:
            message = f"its files could not be kept on a node: {error.strerror}"
            yield {"say": "failed", "code": "storage", "message": message}
        except WorkerLost as error:
            yield _lost(f"says: {error}")

    async def cancel(self, id: str) -> None:
        """See Worker."""
        if self._worker is not None:
            self._worker.cancel(id)

    async def look(self, id: str) -> None:
        """See Worker."""
        if self._worker is not None:
            self._worker.look(id)

    async def stop(self) -> None:
        """Ends the worker's process."""
        if self._worker is not None:
            await self._worker.stop()


def _end_with(parent: int) -> None:
    """Ends this process when its node's part of Ray has ended, which waits for what an actor still does."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _lost(why: str) -> Said:
    return {"say": "lost", "message": f"node {socket.gethostname()} {why}"}


def _task(told: dict[str, Any], pictures: list[bytes], folder: Path) -> Task:
    """The task with paths of this machine, below `folder`."""
    concepts = []
    for number, ((label, _), data) in enumerate(zip(told["concepts"], pictures, strict=True)):
        path = folder / str(number)
        path.write_bytes(data)
        concepts.append([label, str(path)])
    made = folder / "made"
    made.mkdir()
    return Task.from_json({**told, "concepts": concepts, "folder": str(made)})
