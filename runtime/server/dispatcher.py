"""The queue: which job goes to which worker, and what becomes of it when a worker dies.

All of it runs in one event loop, so between two awaits nothing changes. That a job is in progress is said by
the worker that begins to compute it; it is finished when its files are where clients get them.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

from ..workers.interface import JobCancelled, JobFailed, Task, Worker, WorkerLost
from ..workers.team import MOST_DEATHS, Team, make_in_time
from . import jobs
from .events import Events
from .folder import Folder
from .jobs import Job, Store
from .measures import Measures

log = logging.getLogger(__name__)

BETWEEN_SWEEPS = 5.0  # seconds between two looks for what has expired


class QueueFull(Exception):
    """No more jobs are taken. retry_after: seconds in which a place should be free."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Dispatcher:
    """Hands jobs to workers.

    workers: of all bundles; most: jobs that may wait; keep: seconds for which a finished job's
    files stay; patience: seconds in which a worker must say something of its job, or it is replaced; always,
    idle: of each bundle, see Team.
    """

    def __init__(
        self,
        store: Store,
        folder: Folder,
        workers: Sequence[Worker],
        measures: Measures,
        *,
        most: int,
        keep: float,
        patience: float = 600.0,
        always: int | None = None,
        idle: float = 60.0,
    ) -> None:
        self.store, self.folder, self.events = store, folder, Events()
        self._measures, self._most, self._keep, self._patience = measures, most, keep, patience
        self._making: dict[str, Worker] = {}
        self._teams = {
            bundle: Team(
                [worker for worker in workers if worker.bundle == bundle],
                self._claim,
                self._make,
                always=always,
                idle=idle,
                changed=self._count_workers,
            )
            for bundle in dict.fromkeys(worker.bundle for worker in workers)
        }
        self._sweeping: asyncio.Task[None] | None = None
        self._looked: set[str] = set()
        self.held = asyncio.Event()  # no more jobs are taken
        self._held_since, self._hurried = 0.0, False
        self._mean: dict[str, float] = {}  # seconds of a job, by bundle, lately
        for job in store.active():
            self._wait(job)

    async def start(self) -> None:
        """Starts every worker that is always there. Raises WorkerLost where the first of a bundle does not
        come up: no job could be made."""
        await asyncio.gather(*(team.start() for team in self._teams.values()))
        self._sweeping = asyncio.create_task(self._expire())

    def hold(self) -> None:
        """Takes no more jobs and begins none; what is being made goes on. The second time: `drain` no longer
        waits for it."""
        self._hurried = self.held.is_set()
        self._held_since = self._held_since or time.monotonic()
        self.held.set()

    async def drain(self, seconds: float) -> None:
        """Waits for what is being made, at most so long since `hold`, then ends the workers. What was not
        finished is queued, for the next server."""
        if not self.held.is_set():
            self.hold()
        while self._making and not self._hurried and time.monotonic() < self._held_since + seconds:
            await asyncio.sleep(0.05)
        if self._sweeping is not None:
            self._sweeping.cancel()
        await asyncio.gather(*(team.stop() for team in self._teams.values()))

    @property
    def ready(self) -> bool:
        """Whether every bundle has a worker, and jobs are taken."""
        return not self.held.is_set() and all(team.ready for team in self._teams.values())

    @property
    def workers_ready(self) -> int:
        """How many workers are loaded."""
        return sum(team.ready for team in self._teams.values())

    def waiting(self, owner: str | None = None) -> int:
        """Jobs that nobody makes yet, of all or of one owner."""
        return self.store.waiting.count(owner)

    def place(self, job: Job) -> int | None:
        """How many jobs of the same bundle are before it; None once it is begun."""
        number = self.store.number(job) if job.status == jobs.QUEUED else None
        return None if number is None else self.store.waiting.place(number, job.bundle)

    def places(self, owner: str) -> dict[str, int]:
        """`place` of every job of an owner that is not begun."""
        return self.store.waiting.places(owner)

    def check_room(self, bundle: str) -> None:
        """Raises QueueFull."""
        if self.waiting() >= self._most:
            self._measures.refused()
            raise QueueFull(max(1, round(self.pace(bundle))))

    async def submit(self, job: Job, repeat: str | None = None) -> None:
        """Takes a job. Raises sqlite3.Error where it cannot be kept."""
        self.store.add(job, repeat)
        self.events.tell(job, "status")
        self._wait(job)

    def look(self, job: Job) -> None:
        """Somebody looks at a job that is being made: from now on it has previews, which cost time."""
        worker = self._making.get(job.id)
        if worker is not None and job.status == jobs.IN_PROGRESS and job.id not in self._looked:
            self._looked.add(job.id)
            worker.look(job.id)

    def makes(self, id: str) -> bool:
        """Whether a worker has the job."""
        return id in self._making

    async def cancel(self, job: Job) -> Job:
        """Ends a job that is not finished; whoever makes it stops within a step."""
        if not job.active:
            return job
        ended = self._end(job, jobs.CANCELLED)
        if (worker := self._making.get(job.id)) is not None:
            worker.cancel(job.id)
        return ended

    async def delete(self, job: Job) -> None:
        """Ends a job and forgets it, files and all."""
        await self.cancel(job)
        self.folder.drop_pictures(self.store.delete(job.id))
        if job.id not in self._making:  # else when its worker has let go
            self.folder.drop(job.id)
        self.events.tell(job, "status")

    def _wait(self, job: Job) -> None:
        """It is to be made, in its place; of a bundle that is not served (any more) it waits for that."""
        number, team = self.store.number(job), self._teams.get(job.bundle)
        if number is not None and team is not None:
            team.put(number, job.id)
            self._count_jobs(job.bundle)

    def _claim(self, worker: Worker, id: str) -> Job | None:
        """A job that waits, which from here on is the worker's."""
        job = self.store.queued(id)
        if job is None or id in self._making or self.held.is_set():
            return None
        self._making[id] = worker
        return job

    def _count_jobs(self, bundle: str) -> None:
        if (team := self._teams.get(bundle)) is not None and not self.held.is_set():
            team.want(self.store.active_in(bundle))

    def _count_workers(self) -> None:
        self._measures.workers(self.workers_ready, sum(team.wanted for team in self._teams.values()))

    def _still(self, id: str) -> Job | None:
        """The job as it is now, unless it has ended."""
        job = self.store.get(id)
        return job if job is not None and job.active else None

    async def _make(self, worker: Worker, job: Job) -> None:
        """One job, to its end or to its worker's. Raises WorkerLost, and what a worker should be ended for,
        when the job is looked after."""
        id = job.id
        try:
            if self._still(id) is None:  # it ended in the moment in which it was taken
                return
            request = {name: value for name, value in job.request.items() if name != "concepts"}
            concepts = tuple((c["label"], self.folder.picture(c["sha256"])) for c in job.request["concepts"])
            task = Task(id, request, concepts, self.folder.begin(id))
            made = await make_in_time(worker, task, lambda said: self._heard(id, said), self._patience)
            if (now := self._still(id)) is not None:
                self.folder.finish(id)
                self._end(now, jobs.COMPLETED, warnings=tuple(made["warnings"]), seconds=made["seconds"])
        except JobCancelled:
            pass  # it was told when it was asked for
        except JobFailed as error:
            self._fail(id, error.code, str(error))
        except OSError as error:
            self._fail(id, "storage", f"its files could not be kept: {error.strerror}")
        except sqlite3.Error as error:
            await worker.stop()
            raise WorkerLost(f"the jobs cannot be written: {error}") from None
        except Exception as error:
            self._lost(id, str(error) if isinstance(error, WorkerLost) else "something went wrong")
            raise
        finally:
            del self._making[id]
            self._looked.discard(id)
            if (now := self._still(id)) is not None:  # nobody makes it now, so it waits
                self.store.note(id, status=jobs.QUEUED, started_at=None, step=0)
                if now.status != jobs.QUEUED:
                    self.events.tell(now, "status")
            now = self.store.get(id)
            if now is None or now.status != jobs.COMPLETED:
                self.folder.drop(id)
            if now is not None and now.active:
                self._wait(now)

    def _heard(self, id: str, said: dict[str, Any]) -> None:
        job = self._still(id)
        if job is None:
            return
        if said["say"] == "begun":
            self._measures.waited(time.time() - job.created_at)
            self.store.note(id, status=jobs.IN_PROGRESS, started_at=time.time())
            self._tell_waiting(job.bundle)
            self.events.tell(job, "status")
        elif said["say"] == "step":
            self.store.note(id, step=int(said["step"]), steps=int(said["steps"]))
            self.events.tell(job, "step")
        elif said["say"] == "preview":
            self.events.tell(job, "preview")
        if self.events.watched(job) and (now := self._still(id)) is not None:
            self.look(now)

    def _tell_waiting(self, bundle: str) -> None:
        """Those behind have moved up."""
        waiting = self.store.waiting
        self.events.tell_moved(
            lambda id: (job := self.store.queued(id)) is not None and job.bundle == bundle,
            lambda owner: bundle in waiting.bundles(owner),
        )

    def _fail(self, id: str, code: str, message: str) -> None:
        if (job := self._still(id)) is not None:
            self._end(job, jobs.FAILED, error=(code, message))

    def _lost(self, id: str, why: str) -> None:
        """A worker died with this job: once more, unless it has taken too many with it."""
        job = self._still(id)
        if job is None or job.status != jobs.IN_PROGRESS:  # it was not this job that killed it
            return
        if job.deaths + 1 >= MOST_DEATHS:
            message = f"{MOST_DEATHS} workers died while they made it; the last: {why}"
            self._end(job, jobs.FAILED, error=("worker_lost", message), deaths=job.deaths + 1)
            return
        self.store.change(id, status=jobs.QUEUED, started_at=None, step=0, deaths=job.deaths + 1)
        self.events.tell(job, "status")

    def _end(self, job: Job, status: str, **fields: Any) -> Job:
        now = time.time()
        ended = self.store.change(
            job.id, status=status, completed_at=now, expires_at=now + self._keep, **fields
        )
        assert ended is not None
        if status == jobs.COMPLETED and job.started_at is not None:
            took = now - job.started_at
            self._mean[job.bundle] = 0.8 * self._mean.get(job.bundle, took) + 0.2 * took
            self._measures.made(took)
        self._measures.ended(status)
        self._tell_waiting(job.bundle)
        self._count_jobs(job.bundle)
        self.events.tell(job, "status")
        return ended

    def pace(self, bundle: str) -> float:
        """Seconds from one job's end to the next one's, as it was lately; 0 before the first."""
        team = self._teams.get(bundle)
        return 0.0 if team is None else self._mean.get(bundle, 0.0) / team.wanted

    def expected(self, job: Job, place: int | None) -> float:
        """Seconds until a job that waits in this place should begin; with None, until one that is being made
        should be finished. As it was lately; 0 before the first."""
        if place is not None:
            return place * self.pace(job.bundle)
        return self._mean.get(job.bundle, 0.0) * (1 - job.step / max(1, job.steps))

    async def _expire(self) -> None:
        """Lets go of files whose time has come, now and then, and later of all else that is known of them."""
        while True:
            try:
                for job in self.store.due(time.time()):
                    if job.status == jobs.COMPLETED:
                        self.folder.drop(job.id)
                        self.folder.drop_pictures(self.store.release(job.id))
                        self.store.change(job.id, status=jobs.EXPIRED)
                    else:
                        self.folder.drop_pictures(self.store.delete(job.id))
                    self.events.tell(job, "status")
            except (OSError, sqlite3.Error, ValueError) as error:
                log.error("what has expired could not be deleted: %s", error)
            await asyncio.sleep(BETWEEN_SWEEPS)
