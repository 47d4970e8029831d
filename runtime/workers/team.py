"""The workers of one bundle: who is started, who gets the next job, and what happens when one dies.

Jobs wait in their order, whoever gives them back. The first of the workers that are free gets the next, so
where there is little to do the last ones get nothing, and those that need not be there are let go.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from asyncio import FIRST_COMPLETED
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from .interface import Hear, Task, Worker, WorkerLost

log = logging.getLogger(__name__)

MOST_DEATHS = 2  # workers that may die with a job
SLOWEST_RESTART = 60.0  # seconds between two tries to start a worker
STOPPING = 10.0  # seconds for a worker that says nothing

Job = TypeVar("Job")


async def make_in_time(worker: Worker, task: Task, hear: Hear, patience: float) -> dict[str, Any]:
    """`worker.make`. Raises what it raises, and WorkerLost where the worker says nothing for `patience`
    seconds: it is stopped, and nothing is heard of it afterwards."""
    clock, over = asyncio.get_running_loop().time, False

    def heard(said: dict[str, Any]) -> None:
        if not over and not deadline.expired():
            deadline.reschedule(clock() + patience)
            hear(said)

    try:
        async with asyncio.timeout(patience) as deadline:
            return await worker.make(task, heard)
    except TimeoutError:
        if not deadline.expired():
            raise
        with suppress(TimeoutError):  # whoever waits for a disk does not even die
            await asyncio.wait_for(worker.stop(), STOPPING)
        raise WorkerLost(f"it said nothing for {patience:g} seconds, so it was stopped") from None
    finally:
        over = True


class Team(Generic[Job]):
    """Hands jobs to workers of one bundle.

    claim: the job of an id, which from then on is the worker's; None where it is not to be made (any more);
    make: makes it, and raises WorkerLost where the worker has ended, else what it should be ended for;
    always: how many workers are always there, None for all; idle: seconds without a job after which one of
    the others is stopped; changed: called when `ready` or `wanted` may have changed.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        claim: Callable[[Worker, str], Job | None],
        make: Callable[[Worker, Job], Awaitable[None]],
        *,
        always: int | None = None,
        idle: float = 60.0,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.bundle = workers[0].bundle
        self._workers, self._claim, self._make, self._changed = list(workers), claim, make, changed
        self._always = len(workers) if always is None else always
        self._idle = idle
        self._spare = list(reversed(range(self._always, len(workers))))
        self._lives: dict[int, asyncio.Task[None]] = {}
        self._staying: set[int] = set()  # of these, those that are not about to end
        self._loaded: set[int] = set()
        self._waiting: list[tuple[int, str]] = []  # jobs, a heap
        self._free: dict[int, asyncio.Future[Job]] = {}
        self._jobs, self._stopped = 0, False

    @property
    def ready(self) -> int:
        """How many workers are loaded."""
        return len(self._loaded)

    @property
    def wanted(self) -> int:
        """How many there should be: one for each job, within the bounds."""
        return min(max(self._jobs, self._always), len(self._workers))

    async def start(self) -> None:
        """Starts those that are always there. Raises WorkerLost where the first does not come up."""
        await self._workers[0].start()
        for index in range(self._always):
            self._begin(index, started=index == 0)
        self._fit()

    async def stop(self) -> None:
        """Ends all workers, whatever they do."""
        self._stopped = True
        lives = list(self._lives.values())
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    def put(self, number: int, id: str) -> None:
        """A job waits, in the place that its number says."""
        heapq.heappush(self._waiting, (number, id))
        self._match()

    def want(self, jobs: int) -> None:
        """So many jobs wait or are being made."""
        self._jobs = jobs
        self._fit()

    def _match(self) -> None:
        """Jobs to workers, as long as there are both."""
        while self._waiting and self._free:
            first = min(self._free)
            job = self._claim(self._workers[first], heapq.heappop(self._waiting)[1])
            if job is not None:
                self._free.pop(first).set_result(job)

    def _fit(self) -> None:
        """Starts what is wanted; those that are too many go by themselves."""
        while self._lives and not self._stopped and self._spare and len(self._staying) < self.wanted:
            self._begin(self._spare.pop())
        self._changed()

    def _begin(self, index: int, started: bool = False) -> None:
        def ended(_: object) -> None:
            del self._lives[index]
            self._spare.append(index)
            self._fit()

        self._staying.add(index)
        life = self._lives[index] = asyncio.create_task(self._live(index, started))
        life.add_done_callback(ended)

    def _let_go(self, index: int) -> bool:
        """Whether a worker is one too many, and so about to end."""
        if index >= self._always and len(self._staying) > self.wanted:
            self._staying.discard(index)
        return index not in self._staying

    async def _live(self, index: int, started: bool) -> None:
        """A worker's life: started again whenever it dies, at once, or after a while that doubles as long as
        no job gets made; until it is one too many."""
        worker, pause = self._workers[index], 0.0
        while True:
            try:
                if started or await self._started(index):
                    self._set_ready(index, True)
                    while (job := await self._taken(index)) is not None:
                        await self._make(worker, job)
                        pause = 0.0
            except WorkerLost as error:
                log.error("a worker for %s: %s", self.bundle, error)
            except Exception:
                log.exception("a worker for %s: this should not happen", self.bundle)
                await worker.stop()
            finally:
                self._set_ready(index, False)
            if self._let_go(index):
                await worker.stop()
                return
            started = False
            await asyncio.sleep(pause)
            pause = min(max(1.0, 2 * pause), SLOWEST_RESTART)

    async def _started(self, index: int) -> bool:
        """Starts a worker, which may take until a machine is there for it; False where it is no longer
        wanted. Raises WorkerLost."""
        starting = asyncio.create_task(self._workers[index].start())
        try:
            while not starting.done():
                await asyncio.wait({starting}, timeout=self._patience(index))
                if not starting.done() and self._let_go(index):
                    return False
            starting.result()
            return True
        finally:
            starting.cancel()

    async def _taken(self, index: int) -> Job | None:
        """The next job, which from here on is the worker's; None where there was none for long. Raises
        WorkerLost where the worker dies before there is one."""
        worker, found = self._workers[index], asyncio.get_running_loop().create_future()
        self._free[index] = found
        gone = asyncio.create_task(worker.gone())
        try:
            self._match()
            await asyncio.wait({found, gone}, timeout=self._patience(index), return_when=FIRST_COMPLETED)
            if found.done():  # a worker that is gone says so when it is to make it
                return found.result()
            if gone.done():
                raise WorkerLost(gone.result())
            self._staying.discard(index)
            return None
        finally:
            self._free.pop(index, None)
            gone.cancel()

    def _patience(self, index: int) -> float | None:
        """Seconds without a job after which a worker may go; None where it is always there."""
        return self._idle if index >= self._always else None

    def _set_ready(self, index: int, ready: bool) -> None:
        (self._loaded.add if ready else self._loaded.discard)(index)
        self._changed()
