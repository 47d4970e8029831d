"""A batch's videos, made by workers: what it needs of a pipeline, for many threads at once."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import itertools
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from ...errors import BundleError, Cancelled, GenerationError, InputError, OutOfMemory
from ..bundle_format.find import Bundle
from ..request import Concept, Request
from ..video import Video
from .interface import FRAMES, PICTURES, JobFailed, Task, Worker, WorkerLost
from .team import MOST_DEATHS, Team, make_in_time

BETWEEN_LOOKS = 0.5  # seconds between two looks whether a request is still wanted

T = TypeVar("T")


@dataclass(eq=False)
class _Job:
    """A request, its place, and who waits for its videos."""

    number: int
    request: Request
    strict: bool
    made: asyncio.Future[list[Video]]
    deaths: int = 0


class RemotePipeline:
    """Workers of one bundle that is verified here; they live as long as the block of this context manager.

    patience: see `make_in_time`; end: called when all workers have ended.
    """

    def __init__(
        self, bundle: Bundle, workers: Sequence[Worker], patience: float, end: Callable[[], Awaitable[None]]
    ) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self._patience, self._end = patience, end
        self._numbers = itertools.count()
        self._jobs: dict[str, _Job] = {}
        self._team: Team[_Job] = Team(workers, lambda _, id: self._jobs.get(id), self._make)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Starts the workers. Raises GenerationError where the first does not come up."""
        with self._stack as stack:  # what is entered is left again if this is interrupted
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="conceptmaster-")))
            running: Future[asyncio.AbstractEventLoop] = Future()
            over = asyncio.Event()
            thread = threading.Thread(target=lambda: asyncio.run(_loop(running, over)), daemon=True)
            thread.start()
            self._loop = running.result()
            stack.callback(thread.join)
            stack.callback(self._loop.call_soon_threadsafe, over.set)
            stack.callback(lambda: self._wait_for(self._stop()))
            try:
                self._wait_for(self._team.start())
            except WorkerLost as error:
                raise GenerationError(f"no worker came up: {error}") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def generate(self, request: Request, *, callback: Callable[..., bool], strict: bool) -> list[Video]:
        """As `Pipeline.generate`; callback: False when the videos are not wanted any more, at any time.

        Raises as that does; GenerationError where workers die with it; OSError where a worker's disk is full.
        """
        future = asyncio.run_coroutine_threadsafe(self._made(request, strict), self._loop)
        while True:
            try:
                return future.result(BETWEEN_LOOKS)
            except TimeoutError:
                if future.done():
                    raise
                if not callback():
                    future.cancel()
                    raise Cancelled("cancelled while a worker made it") from None

    def _wait_for(self, done: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(done, self._loop).result()

    async def _stop(self) -> None:
        await self._team.stop()
        await self._end()

    async def _made(self, request: Request, strict: bool) -> list[Video]:
        number = next(self._numbers)
        job = _Job(number, request, strict, asyncio.get_running_loop().create_future())
        self._jobs[str(number)] = job
        self._team.put(number, str(number))
        try:
            return await job.made
        finally:
            del self._jobs[str(number)]

    async def _make(self, worker: Worker, job: _Job) -> None:
        """One try of a job. Raises WorkerLost, when the job waits again or has failed."""
        request, id = job.request, str(job.number)
        asked = {
            f.name: getattr(request, f.name) for f in dataclasses.fields(request) if f.name != "concepts"
        }
        concepts = tuple((concept.label, Path(concept.image)) for concept in request.concepts)  # type: ignore[arg-type]
        begun = False

        def hear(_: dict[str, Any]) -> None:
            nonlocal begun
            begun = True

        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            task = Task(id, asked, concepts, Path(name), frames=True, strict=job.strict)
            try:
                made = await make_in_time(worker, task, hear, self._patience)
                videos = await asyncio.to_thread(self._read, request, Path(name), made)
            except WorkerLost as error:
                job.deaths += begun
                if job.deaths >= MOST_DEATHS:
                    many = f"{MOST_DEATHS} workers died while they made it; the last: {error}"
                    _tell(job, GenerationError(many))
                else:
                    self._team.put(job.number, id)
                raise
            except JobFailed as error:
                _tell(job, _error(error))
            except Exception as error:
                _tell(job, error)
            else:
                _tell(job, videos)

    def _read(self, request: Request, folder: Path, made: dict[str, Any]) -> list[Video]:
        concepts: tuple[Concept, ...] = ()
        if request.concepts:
            seen = np.load(folder / PICTURES, allow_pickle=False)
            concepts = tuple(Concept(c.label, image) for c, image in zip(request.concepts, seen, strict=True))
        about = request.prompt, concepts, made["seconds"], tuple(made["warnings"])
        frames = (np.load(folder / FRAMES.format(n), allow_pickle=False) for n in range(request.samples))
        return [
            Video(array, self.manifest.fps, seed, *about)
            for array, seed in zip(frames, request.seeds, strict=True)
        ]


async def _loop(running: Future[asyncio.AbstractEventLoop], over: asyncio.Event) -> None:
    """Gives away its event loop, and keeps it until it is over."""
    running.set_result(asyncio.get_running_loop())
    await over.wait()
    await asyncio.sleep(0.01)  # in which the pipes of processes that have ended are closed


def _tell(job: _Job, outcome: list[Video] | Exception) -> None:
    if job.made.done():  # nobody waits for it any more
        return
    if isinstance(outcome, Exception):
        job.made.set_exception(outcome)
    else:
        job.made.set_result(outcome)


def _error(failed: JobFailed) -> Exception:
    """What the pipeline would have raised."""
    message = str(failed)
    if failed.code == "invalid_request":
        return InputError(message)
    if failed.code == "damaged_bundle":
        return BundleError(message)
    if failed.code == "out_of_memory":
        return OutOfMemory(message.removeprefix("out of memory: "))
    if failed.code == "storage":
        return OSError(errno.ENOSPC, message)
    return GenerationError(message)
