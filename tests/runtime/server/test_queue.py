"""The queue and who may ask, in one process, with workers that do as they are told."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from conceptmaster.errors import InputError
from conceptmaster.runtime.server import dispatcher as dispatchers
from conceptmaster.runtime.server import guard, jobs
from conceptmaster.runtime.server.app import create_app
from conceptmaster.runtime.server.callbacks import PREFIX, Callbacks
from conceptmaster.runtime.server.catalogue import Catalogue
from conceptmaster.runtime.server.dispatcher import Dispatcher
from conceptmaster.runtime.server.folder import Folder
from conceptmaster.runtime.server.jobs import Store
from conceptmaster.runtime.server.keys import Keys, new_key
from conceptmaster.runtime.server.measures import Measures
from conceptmaster.runtime.server.service import Limits, Service
from conceptmaster.runtime.workers import team
from conceptmaster.runtime.workers.interface import Hear, JobCancelled, JobFailed, Task, WorkerLost

from .conftest import PROMPT

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Puppet:
    """A Worker that makes each job when it is let, as it is told to."""

    bundle = "fake"

    def __init__(self) -> None:
        self.let = asyncio.Semaphore(0)
        self.acts: list[Callable[[Task], Awaitable[None]]] = []
        self.made: list[str] = []
        self.cancelled: set[str] = set()
        self.starts = 0

    async def start(self) -> None:
        self.starts += 1

    async def make(self, task: Task, hear: Hear) -> dict[str, Any]:
        hear({"say": "begun", "id": task.id})
        await self.let.acquire()
        if task.id in self.cancelled:
            raise JobCancelled
        hear({"say": "step", "id": task.id, "step": 1, "steps": 1})
        if self.acts:
            await self.acts.pop(0)(task)
        for name in ("video-0.mp4", "thumbnail-0.webp", "spritesheet-0.png"):
            (task.folder / name).write_bytes(b"made")
        self.made.append(task.id)
        return {"warnings": [], "seconds": {}}

    async def gone(self) -> str:
        await asyncio.Event().wait()
        return ""

    def cancel(self, id: str) -> None:
        self.cancelled.add(id)
        self.let.release()

    def look(self, id: str) -> None:
        pass

    async def stop(self) -> None:
        pass


class Stage:
    """A server without a socket."""

    def __init__(self, service: Service, worker: Puppet, http: httpx.AsyncClient) -> None:
        self.service, self.worker, self.http = service, worker, http
        self.store, self.folder = service.dispatcher.store, service.folder

    async def ask(self, picture: bytes | None = None, **headers: str) -> httpx.Response:
        parts: list[Any] = [("prompt", (None, PROMPT))]
        if picture is not None:
            parts += [("label", (None, "ball")), ("input_reference", ("x.png", picture))]
        return await self.http.post("/v1/videos", files=parts, headers=headers)

    async def until(self, id: str, status: str) -> jobs.Job:
        while (job := self.store.get(id)) is None or job.status != status:
            await asyncio.sleep(0.01)
        return job


@pytest.fixture
def stage(bundle: Path, tmp_path: Path) -> Callable[..., Any]:
    """`async with stage(most=…, keep=…, per_owner=…, keys=…) as s:`"""

    @asynccontextmanager
    async def build(
        most: int = 100, keep: float = 3600.0, per_owner: int = 100, keys: Keys | None = None
    ) -> Any:
        worker, measures = Puppet(), Measures()
        with Folder(tmp_path / "jobs") as folder:
            store = Store(folder.database)
            queue = Dispatcher(store, folder, [worker], measures, most=most, keep=keep)
            callbacks = Callbacks([], PREFIX + "eA==")
            limits = Limits(10**7, per_owner)
            service = Service(
                Catalogue([str(bundle)]), folder, queue, measures, callbacks, limits, keys, ("test",)
            )
            await queue.start()
            transport = httpx.ASGITransport(create_app(service))  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                async with asyncio.timeout(60):
                    yield Stage(service, worker, http)
            await queue.drain(0)
            store.close()

    return build


async def test_a_full_queue_refuses_and_says_when_to_come_again(stage: Callable) -> None:
    async with stage(most=2) as s:
        await s.until((await s.ask()).json()["id"], "in_progress")
        waiting = [(await s.ask()).json()["id"] for _ in range(2)]
        full = await s.ask()
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert full.json()["error"]["type"] == "rate_limit_error" and int(full.headers["retry-after"]) >= 1
        s.worker.let.release()
        await s.until(waiting[0], "in_progress")
        assert (await s.ask()).status_code == 200


async def test_whoever_asks_is_told_to_ask_again_when_most_of_it_should_be_done(stage: Callable) -> None:
    async with stage() as s:
        first, second, third = [(await s.ask()).json()["id"] for _ in range(3)]

        async def pause(id: str) -> int:
            return int((await s.http.get(f"/v1/videos/{id}")).headers["openai-poll-after-ms"])

        await s.until(first, "in_progress")
        assert await pause(first) == 500  # nobody knows yet how long one takes
        s.service.dispatcher._mean["fake"] = 5.0
        assert (await pause(first), await pause(third)) == (4000, 4000)
        s.store.note(first, step=3, steps=4)
        assert await pause(first) == 1000
        s.service.dispatcher._mean["fake"] = 300.0
        assert (await pause(first), await pause(second)) == (10_000, 500)


async def test_jobs_are_made_in_order_and_by_what_the_worker_says(stage: Callable) -> None:
    async def refuse(task: Task) -> None:
        raise JobFailed("invalid_request", "this cannot be made")

    async def break_down(task: Task) -> None:
        raise RuntimeError("a fault of ours")

    async with stage() as s:
        ids = [(await s.ask()).json()["id"] for _ in range(4)]
        s.worker.acts = [refuse, break_down]
        for _ in range(5):
            s.worker.let.release()
        await s.until(ids[3], "completed")
        assert s.worker.made == ids[1:]  # the second one once more, before the others
        assert (await s.http.get(f"/v1/videos/{ids[0]}")).json()["error"] == {
            "code": "invalid_request", "message": "this cannot be made",
        }  # fmt: skip
        assert s.store.get(ids[1]).deaths == 1 and s.worker.starts == 2


async def test_a_job_that_ends_in_the_moment_in_which_it_is_taken_is_not_made(stage: Callable) -> None:
    async with stage() as s:
        (await s.ask()).json()
        ids = [(await s.ask()).json()["id"] for _ in range(3)]
        team = s.service.dispatcher._teams["fake"]
        make = team._make

        async def late(worker: Any, job: jobs.Job) -> None:
            if job.id == ids[0]:
                await s.service.dispatcher.cancel(job)
            if job.id == ids[1]:
                await s.service.dispatcher.delete(job)
            await make(worker, job)

        team._make = late
        for _ in range(2):
            s.worker.let.release()
        await s.until(ids[2], "completed")
        assert s.store.get(ids[0]).status == "cancelled" and s.store.get(ids[1]) is None
        assert s.worker.made[1:] == [ids[2]]


class Late(Puppet):
    """A Worker that hangs in its first job, is held for dead, and goes on all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.stopped = asyncio.Event(), asyncio.Event()
        self.late: asyncio.Task[None] | None = None

    async def make(self, task: Task, hear: Hear) -> dict[str, Any]:
        if self.late is not None:
            return await super().make(task, hear)
        hear({"say": "begun", "id": task.id})
        self.late = asyncio.create_task(self._late(task, hear))
        await asyncio.Event().wait()
        return {}

    async def _late(self, task: Task, hear: Hear) -> None:
        await self.again.wait()
        for name in ("video-0.mp4", "thumbnail-0.webp", "spritesheet-0.png"):
            with suppress(OSError):
                (task.folder / name).write_bytes(b"late")
        hear({"say": "step", "id": task.id, "step": 7, "steps": 9})
        hear({"say": "begun", "id": task.id})

    async def stop(self) -> None:
        self.stopped.set()


@pytest.mark.parametrize("when", ["while the other makes it", "when the other has made it"])
async def test_of_two_workers_that_answer_for_one_job_the_one_that_is_waited_for_counts(
    stage: Callable, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with stage() as s:
        late, other = Late(), Puppet()
        queue = Dispatcher(s.store, s.folder, [late, other], Measures(), most=9, keep=99.0, patience=1.0)
        await queue.start()
        request = {"prompt": PROMPT, "seed": 1, "concepts": []}
        await queue.submit(jobs.Job("twice", "", "fake", request, "digest", time.time()))
        await s.until("twice", "in_progress")
        await late.stopped.wait()
        while s.store.get("twice").deaths == 0:
            await asyncio.sleep(0.01)
        if when.startswith("while"):
            await s.until("twice", "in_progress")
            late.again.set()
            await late.late
            assert s.store.get("twice").step == 0
        other.let.release()
        job = await s.until("twice", "completed")
        late.again.set()
        await late.late
        assert (await s.http.get("/v1/videos/twice/content")).content == b"made"
        assert s.store.get("twice") == job and other.made == ["twice"]
        assert [record.message for record in caplog.records] == [
            "a worker for fake: it said nothing for 1 seconds, so it was stopped"
        ]
        await queue.drain(0)


async def test_a_job_with_which_two_workers_hang_has_failed(stage: Callable) -> None:
    async with stage() as s:
        workers = [Late(), Late()]
        queue = Dispatcher(s.store, s.folder, workers, Measures(), most=9, keep=99.0, patience=0.1)
        await queue.start()
        request = {"prompt": PROMPT, "seed": 1, "concepts": []}
        for id in ("first", "next"):
            await queue.submit(jobs.Job(id, "", "fake", request, "digest", time.time()))
        await s.until("first", "failed")
        assert (await s.http.get("/v1/videos/first")).json()["error"] == {
            "code": "worker_lost",
            "message": "2 workers died while they made it; the last: it said nothing for 0.1 seconds, "
            "so it was stopped",
        }
        await queue.drain(0)


async def test_a_full_disk_while_a_job_ends_makes_it_wait(
    stage: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team, "SLOWEST_RESTART", 0.01)
    async with stage() as s:
        id = (await s.ask()).json()["id"]
        await s.until(id, "in_progress")
        s.store._db.execute("create trigger full before update on jobs begin select raise(fail, 'full'); end")
        for _ in range(3):
            s.worker.let.release()
        while len(s.worker.made) < 3:
            await asyncio.sleep(0.01)
        video = (await s.http.get(f"/v1/videos/{id}")).json()
        assert video["status"] in ("queued", "in_progress") and video["error"] is None
        s.store._db.execute("drop trigger full")
        s.worker.let.release()
        await s.until(id, "completed")
        assert (await s.http.get(f"/v1/videos/{id}/content")).content == b"made"


async def test_finished_jobs_expire_and_are_forgotten_later(
    stage: Callable, pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatchers, "BETWEEN_SWEEPS", 0.01)

    async def refuse(task: Task) -> None:
        raise JobFailed("failed", "no")

    async with stage(keep=0.2) as s:
        done, failed = [(await s.ask(pictures["ball"].read_bytes())).json()["id"] for _ in range(2)]
        s.worker.let.release()
        await s.until(done, "completed")
        s.worker.acts = [refuse]
        s.worker.let.release()
        job = await s.until(done, "expired")
        gone = await s.http.get(f"/v1/videos/{done}/content")
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "expired")
        while s.store.get(failed) is not None:
            await asyncio.sleep(0.01)
        assert not list(s.folder.videos.iterdir()) and not list(s.folder.pictures.iterdir())
        assert (await s.http.get(f"/v1/videos/{done}/references/0")).status_code == 410
        s.store.change(done, expires_at=job.expires_at - jobs.FORGOTTEN)
        while s.store.get(done) is not None:
            await asyncio.sleep(0.01)


async def test_a_picture_that_one_job_lets_go_of_while_another_comes_is_there(
    stage: Callable, pictures: dict[str, Path]
) -> None:
    data = pictures["ball"].read_bytes()
    async with stage() as s:
        (await s.ask()).json()  # which keeps the worker
        last = (await s.ask(data)).json()["id"]
        for _ in range(20):
            coming, _ = await asyncio.gather(s.ask(data), s.http.delete(f"/v1/videos/{last}"))
            last = coming.json()["id"]
            (digest,) = s.store.get(last).pictures
            assert s.folder.picture(digest).read_bytes() == data
        assert len(list(s.folder.pictures.iterdir())) == 1
        await s.http.delete(f"/v1/videos/{last}")
        assert not list(s.folder.pictures.iterdir())


async def test_what_was_refused_leaves_nothing(stage: Callable, pictures: dict[str, Path]) -> None:
    async with stage(per_owner=1) as s:
        await s.until((await s.ask()).json()["id"], "in_progress")
        await s.ask()
        refused = await s.ask(pictures["ball"].read_bytes())
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_waiting")
        assert refused.headers["retry-after"] == "5"
        s.store._db.execute("create trigger full before insert on jobs begin select raise(fail, 'full'); end")
        s.service.limits = Limits(10**7, 100)
        full = await s.ask(pictures["ball"].read_bytes())
        assert (full.status_code, full.json()["error"]["code"]) == (507, "storage")
        assert not list(s.folder.pictures.iterdir())


# Who may ask.


async def test_each_key_has_its_own_videos(stage: Callable, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    one, two = (new_key(name, file) for name in ("one", "two"))
    assert one not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    async with stage(keys=Keys(file)) as s:
        for headers in ({}, {"authorization": "Bearer cm-wrong"}, {"authorization": f"Basic {one}"},
                        {"cookie": "conceptmaster_session=x"}):  # fmt: skip
            for method, path in (("POST", "/v1/videos"), ("GET", "/v1/videos"), ("GET", "/v1/models"),
                                 ("GET", "/metrics"), ("GET", "/v1/videos/x/content"), ("GET", "/v1/events"),
                                 ("DELETE", "/v1/videos/x")):  # fmt: skip
                answer = await s.http.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert (await s.http.get("/health/live")).status_code == 200  # needs no key
        mine, other = ({"authorization": f"Bearer {key}"} for key in (one, two))
        id = (await s.ask(**mine)).json()["id"]
        assert (await s.http.get(f"/v1/videos/{id}", headers=mine)).status_code == 200
        for method, what in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("GET", "/preview"),
                             ("GET", "/references/0"), ("POST", "/cancel"), ("DELETE", "")):  # fmt: skip
            answer = await s.http.request(method, f"/v1/videos/{id}{what}", headers=other)
            assert answer.status_code == 404
        assert (await s.http.get("/v1/videos", headers=other)).json()["data"] == []
        after = await s.http.get(f"/v1/videos?after={id}", headers=other)
        assert after.status_code == 400
        repeated = [await s.ask(**headers, **{"idempotency-key": "same"}) for headers in (mine, other)]
        assert repeated[0].json()["id"] != repeated[1].json()["id"]


async def test_the_page_signs_in_once_and_has_a_cookie_that_scripts_cannot_read(
    stage: Callable, tmp_path: Path
) -> None:
    key = new_key("one", tmp_path / "keys")
    async with stage(keys=Keys(tmp_path / "keys")) as s:
        assert (await s.http.post("/session", json={"key": "cm-wrong"})).status_code == 401
        answer = await s.http.post("/session", json={"key": key})
        cookie = answer.headers["set-cookie"].lower()
        assert answer.status_code == 204 and "httponly" in cookie and "samesite=strict" in cookie
        assert key.lower() not in cookie
        assert (await s.http.get("/v1/videos")).status_code == 200
        foreign = {"origin": "https://evil.example"}
        assert (await s.http.post("/v1/videos", json={"prompt": PROMPT}, headers=foreign)).status_code == 403
        secret = s.http.cookies["conceptmaster_session"]
        assert (await s.http.delete("/session")).status_code == 204
        s.http.cookies.set("conceptmaster_session", secret)
        assert (await s.http.get("/v1/videos")).status_code == 401


def test_a_file_of_keys_is_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one sha256:" + "0" * 64)  # without an end of line
    key = new_key("two", file)
    assert Keys(file).owner(key) == "two"
    with pytest.raises(InputError, match="has a key called 'two' already"):
        new_key("two", file)
    for text in ("", "one", "one sha256:00", "a b sha256:" + "0" * 64, ("x sha256:" + "0" * 64 + "\n") * 2):
        file.write_text(text)
        with pytest.raises(InputError):
            Keys(file)
    with pytest.raises(InputError, match="a key's name"):
        new_key("../x y", tmp_path / "new")


# Bodies under way.


def body_of(parts: list[dict[str, Any]]) -> Callable[[], Awaitable[dict[str, Any]]]:
    async def receive() -> dict[str, Any]:
        if parts:
            return {"type": "http.request", **parts.pop(0)}
        await asyncio.Event().wait()
        raise AssertionError

    return receive


async def answered(guarded: guard.Guard, parts: list[dict[str, Any]]) -> int:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "headers": [(b"host", b"test")]}
    await guarded(scope, body_of(parts), send)
    return int(sent[0]["status"])


async def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.05)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guarded = guard.Guard(app, hosts=("test",), most=100)
    assert await answered(guarded, [{"body": b"x", "more_body": True}]) == 408
    assert await answered(guarded, [{"body": b"x", "more_body": True}, {"body": b"y"}]) == 200
    assert await answered(guarded, [{"body": b"x" * 60, "more_body": True}, {"body": b"y" * 60}]) == 413


async def test_all_bodies_together_have_a_largest_size() -> None:
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guarded = guard.Guard(app, hosts=("test",), most=100)
    held = [asyncio.create_task(answered(guarded, [{"body": b"x" * 100}])) for _ in range(guard.AT_ONCE)]
    await asyncio.sleep(0)
    assert await answered(guarded, [{"body": b"x" * 100}]) == 503
    go.set()
    assert await asyncio.gather(*held) == [200] * guard.AT_ONCE
    assert await answered(guarded, [{"body": b"x" * 100}]) == 200


# What is kept.


def test_a_store_that_is_damaged_or_foreign_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = Store(path)
    job = jobs.Job("video_1", "", "fake", {"prompt": PROMPT, "concepts": []}, "", 0.0)
    store.add(job)
    assert path.stat().st_mode & 0o777 == 0o600
    store.close()
    database = sqlite3.connect(path)
    for data in ("{}", json.dumps({"error": None, "warnings": [], "id": 1}), "nothing", "[]"):
        database.execute("update jobs set data = ?", (data,))
        database.commit()
        with pytest.raises(ValueError, match="a job that is none of this version's"):
            Store(path)


async def test_a_worker_that_does_not_come_up_is_told_of(stage: Callable) -> None:
    class Dead(Puppet):
        async def start(self) -> None:
            raise WorkerLost("it has no hands")

    async with stage() as s:
        queue = Dispatcher(s.store, s.folder, [Dead()], Measures(), most=1, keep=1.0)
        with pytest.raises(WorkerLost, match="it has no hands"):
            await queue.start()
