"""A bundle's workers: order, deaths, deadlines, and how many there are. They do as they are told."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conceptmaster.runtime.workers.interface import Hear, Task, WorkerLost
from conceptmaster.runtime.workers.team import Team, make_in_time

pytestmark = pytest.mark.anyio
IDLE = 0.05


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Puppet:
    """A Worker whose life is told by events."""

    bundle = "fake"

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.may_start, self.dead = asyncio.Event(), asyncio.Event()
        self.may_start.set()
        self.log: list[str] = []
        self.hear: Hear | None = None

    async def start(self) -> None:
        self.log.append("start")
        await self.may_start.wait()
        self.dead.clear()

    async def make(self, task: Task, hear: Hear) -> dict[str, Any]:
        self.hear = hear
        hear({"say": "begun", "id": task.id})
        await self.dead.wait()
        raise WorkerLost("it died")

    async def gone(self) -> str:
        await self.dead.wait()
        return "it died"

    def cancel(self, id: str) -> None: ...

    def look(self, id: str) -> None: ...

    async def stop(self) -> None:
        self.log.append("stop")


class Work:
    """Jobs that are made when they are let."""

    def __init__(self, count: int, **options: Any) -> None:
        self.workers = [Puppet(number) for number in range(count)]
        self.jobs: set[str] = set()
        self.claims = Counter[str]()
        self.makes: dict[str, int] = {}
        self.let: dict[str, asyncio.Future[None]] = {}
        self.team: Team[str] = Team(self.workers, self._claim, self._make, **options)

    def ask(self, *numbers: int) -> None:
        for number in numbers:
            self.jobs.add(str(number))
            self.let[str(number)] = asyncio.get_running_loop().create_future()
            self.team.want(len(self.jobs))
            self.team.put(number, str(number))

    def end(self, *numbers: int, error: Exception | None = None) -> None:
        for number in numbers:
            future = self.let[str(number)]
            future.set_exception(error) if error else future.set_result(None)

    def _claim(self, worker: Any, id: str) -> str | None:
        self.claims[id] += 1
        return id if id in self.jobs else None

    async def _make(self, worker: Any, id: str) -> None:
        self.makes[id] = worker.number
        try:
            await self.let[id]
            self.jobs.discard(id)
            self.team.want(len(self.jobs))
        except WorkerLost:
            self.let[id] = asyncio.get_running_loop().create_future()
            self.team.put(int(id), id)
            raise
        finally:
            del self.makes[id]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.001)


async def test_jobs_keep_their_places_and_only_one_worker_is_asked_for_each() -> None:
    work = Work(2)
    work.ask(3, 1, 2, 4, 5, 6)
    await work.team.start()
    await until(lambda: len(work.makes) == 2)
    assert set(work.makes) == {"1", "2"}
    work.end(1, error=WorkerLost("killed"))
    await until(lambda: work.workers[0].log.count("start") == 2 and "1" in work.makes)  # before 3
    work.jobs.discard("3")  # it is cancelled
    work.end(2)
    await until(lambda: set(work.makes) == {"1", "4"})
    assert work.claims == {"1": 2, "2": 1, "3": 1, "4": 1}  # nobody has looked at the others
    await work.team.stop()


async def test_a_worker_that_dies_while_nothing_is_asked_of_it_is_started_again() -> None:
    work = Work(1)
    await work.team.start()
    await until(lambda: work.team.ready == 1)
    work.workers[0].may_start.clear()
    work.workers[0].dead.set()
    await until(lambda: work.team.ready == 0 and work.workers[0].log[-1] == "start")
    work.ask(1)
    work.workers[0].may_start.set()
    await until(lambda: "1" in work.makes)
    await work.team.stop()
    assert work.workers[0].log[-1] == "stop"


async def test_a_job_for_a_worker_that_dies_in_that_moment_goes_to_another() -> None:
    work = Work(1)
    await work.team.start()
    await until(lambda: work.team.ready == 1 and bool(work.team._free))
    work.ask(1)
    work.workers[0].dead.set()
    await until(lambda: "1" in work.makes)
    await work.team.stop()


async def test_there_are_as_many_workers_as_jobs_within_the_bounds() -> None:
    changes: list[tuple[int, int]] = []
    work = Work(4, always=1, idle=IDLE, changed=lambda: changes.append((work.team.ready, work.team.wanted)))
    await work.team.start()
    await until(lambda: work.team.ready == 1)
    await asyncio.sleep(3 * IDLE)
    assert (work.team.ready, work.team.wanted) == (1, 1)  # it is always there
    work.ask(1, 2, 3)
    assert work.team.wanted == 3
    await until(lambda: len(work.makes) == 3)
    assert [worker.log.count("start") for worker in work.workers] == [1, 1, 1, 0]
    work.ask(4, 5, 6)
    assert work.team.wanted == 4
    await until(lambda: len(work.makes) == 4)
    await asyncio.sleep(3 * IDLE)
    assert work.team.ready == 4  # none goes that has a job
    work.end(1, 2, 3, 4, 5, 6)
    await until(lambda: not work.jobs)
    await until(lambda: work.team.ready == 1)
    assert [worker.log[-1] for worker in work.workers] == ["start", "stop", "stop", "stop"]
    assert changes[-1] == (1, 1) and (4, 4) in changes
    work.ask(7, 8)  # and again
    await until(lambda: len(work.makes) == 2)
    await work.team.stop()
    assert {worker.log[-1] for worker in work.workers} == {"stop"}


async def test_a_worker_that_waits_for_a_machine_is_let_go_when_it_is_no_longer_wanted() -> None:
    work = Work(3, always=1, idle=IDLE)
    await work.team.start()
    for worker in work.workers[1:]:
        worker.may_start.clear()
    work.ask(1, 2, 3)
    await until(lambda: all(worker.log for worker in work.workers) and len(work.makes) == 1)
    await asyncio.sleep(3 * IDLE)
    assert [worker.log for worker in work.workers[1:]] == [["start"], ["start"]]  # it may take for ever
    work.end(1)
    await until(lambda: "2" in work.makes)
    await until(lambda: [worker.log[-1] for worker in work.workers].count("stop") == 1)
    await asyncio.sleep(3 * IDLE)  # the other one is wanted
    assert sorted(worker.log[-1] for worker in work.workers[1:]) == ["start", "stop"]
    work.end(2, 3)
    await until(lambda: work.workers[1].log == work.workers[2].log == ["start", "stop"])
    assert work.team.ready == 1
    await work.team.stop()


async def test_where_there_is_little_to_do_the_last_workers_get_nothing() -> None:
    work = Work(3, always=3)
    await work.team.start()
    await until(lambda: len(work.team._free) == 3)
    for number in range(6):
        work.ask(number)
        await until(lambda number=number: str(number) in work.makes)
        assert work.makes == {str(number): 0}
        work.end(number)
        await until(lambda: len(work.team._free) == 3)
    await work.team.stop()


async def test_a_worker_that_says_nothing_is_lost_and_is_not_heard_afterwards(tmp_path: Path) -> None:
    worker, said = Puppet(), list[dict[str, Any]]()
    start = time.monotonic()
    making = asyncio.create_task(make_in_time(worker, Task("a", {}, (), tmp_path), said.append, patience=0.2))
    for _ in range(6):  # twice as long, but never silent for long
        await asyncio.sleep(0.07)
        worker.hear({"say": "alive", "id": "a"})
    assert not making.done() and len(said) == 7
    with pytest.raises(WorkerLost, match=r"it said nothing for 0\.2 seconds, so it was stopped"):
        await making
    assert time.monotonic() - start > 0.6 and worker.log == ["stop"]
    worker.hear({"say": "step", "id": "a", "step": 1, "steps": 2})
    assert len(said) == 7
