"""What dies in the middle: workers, the server, a disk that is full. Real processes, really killed."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from .conftest import LONG, PROMPT, Server, waited

StartServer = Callable[..., Server]
SLOW = {"steps": "1000", "n": "3"}  # seconds, and then it is done


@pytest.fixture(scope="module")
def faulty(serving: Callable, tmp_path_factory: pytest.TempPathFactory) -> object:
    """A server whose workers may be killed."""
    with serving(data=tmp_path_factory.mktemp("data") / "jobs") as running:
        yield running


def kill_worker(server: Server, sign: int = signal.SIGKILL) -> None:
    (pid,) = waited(server.workers)
    os.kill(pid, sign)
    waited(lambda: pid not in server.workers())


def in_progress(video: dict) -> bool:
    return video["status"] == "in_progress" and video["step"] > 5


def test_a_job_whose_worker_dies_runs_again_and_is_the_same(faulty: Server) -> None:
    right = faulty.content(faulty.wait(faulty.ask(seed="4", **SLOW)["id"])["id"])
    id = faulty.ask(seed="4", **SLOW)["id"]
    faulty.wait(id, in_progress)
    kill_worker(faulty)
    seen = faulty.wait(id, lambda video: video["status"] != "in_progress" or video["step"] == 0)
    assert seen["status"] in ("queued", "in_progress")
    assert faulty.wait(id)["status"] == "completed"
    assert faulty.content(id) == right


def test_a_job_that_kills_two_workers_has_failed_and_the_next_is_made(faulty: Server) -> None:
    id, next_one = faulty.ask(**LONG)["id"], faulty.ask()["id"]
    for _ in range(2):
        faulty.wait(id, in_progress)
        kill_worker(faulty)
    video = faulty.wait(id)
    assert (video["status"], video["error"]["code"]) == ("failed", "worker_lost")
    assert "2 workers died while they made it" in video["error"]["message"]
    answer = faulty.http.get(f"/v1/videos/{id}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "worker_lost")
    assert faulty.wait(next_one)["status"] == "completed"


def test_a_worker_that_hangs_is_replaced_and_another_makes_its_job(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server("--workers", "2", "--step-timeout", "3", data=tmp_path / "jobs")
    waited(lambda: server.http.get("/health/ready").json()["workers"] == 2)
    right = server.content(server.wait(server.ask(seed="4", **SLOW)["id"])["id"])
    id, before = server.ask(seed="4", **SLOW)["id"], {pid: _ticks(pid) for pid in server.workers()}
    server.wait(id, in_progress)
    (hung,) = [pid for pid, ticks in before.items() if _ticks(pid) > ticks + 1]
    os.kill(hung, signal.SIGSTOP)
    assert server.wait(id)["status"] == "completed"
    assert server.content(id) == right
    waited(lambda: hung not in server.workers() and len(server.workers()) == 2)
    said = [line for line in server.log.read_text().splitlines() if "said nothing" in line]
    assert len(said) == 1 and "it said nothing for 3 seconds, so it was stopped" in said[0]


def _ticks(pid: int) -> int:
    """What a process has had of the processor."""
    with open(f"/proc/{pid}/stat") as file:
        return sum(map(int, file.read().split(") ")[1].split()[11:13]))


def test_an_idle_worker_that_dies_is_replaced(faulty: Server) -> None:
    waited(lambda: faulty.http.get("/health/ready").status_code == 200)
    kill_worker(faulty)
    waited(lambda: faulty.http.get("/health/ready").status_code == 503)
    id = faulty.ask()["id"]
    assert faulty.get(id)["status"] == "queued"
    assert faulty.wait(id)["status"] == "completed"
    kill_worker(faulty)  # and one that dies while it loads
    kill_worker(faulty)
    waited(lambda: faulty.http.get("/health/ready").status_code == 200)
    assert faulty.wait(faulty.ask()["id"])["status"] == "completed"


def test_a_cancelled_job_stays_cancelled_when_its_worker_dies(faulty: Server) -> None:
    id = faulty.ask(**LONG)["id"]
    faulty.wait(id, in_progress)
    (pid,) = faulty.workers()
    os.kill(pid, signal.SIGSTOP)  # it does not hear of it
    faulty.http.post(f"/v1/videos/{id}/cancel")
    os.kill(pid, signal.SIGKILL)
    assert faulty.wait(faulty.ask()["id"])["status"] == "completed"
    assert faulty.get(id)["status"] == "cancelled"


def test_a_server_that_is_killed_loses_nothing(
    start_server: StartServer, tmp_path: Path, pictures: dict[str, Path]
) -> None:
    data = tmp_path / "jobs"
    first = start_server(data=data)
    done = first.wait(first.ask(pictures["ball"], seed="2")["id"])
    right = first.content(done["id"])
    cancelled = first.ask()["id"]
    first.http.post(f"/v1/videos/{cancelled}/cancel")
    running = first.ask(seed="3", **SLOW)["id"]
    key = {"idempotency-key": "once"}
    posted = first.http.post("/v1/videos", json={"prompt": PROMPT, "seed": 2}, headers=key).json()["id"]
    queued = [first.ask(pictures["ball"], seed="2")["id"] for _ in range(3)]
    first.wait(running, in_progress)
    (worker,) = first.workers()
    first.stop(signal.SIGKILL)
    waited(lambda: not _alive(worker))  # it ends with its server
    assert (data / "making").exists()

    second = start_server(data=data)
    assert second.get(done["id"]) == done and second.content(done["id"]) == right
    assert second.get(cancelled)["status"] in ("cancelled", "completed")
    again = second.http.post("/v1/videos", json={"prompt": PROMPT, "seed": 2}, headers=key).json()["id"]
    assert again == posted
    every = [video["id"] for video in second.http.get("/v1/videos?order=asc").json()["data"]]
    assert every == [done["id"], cancelled, running, posted, *queued]  # each once, in the same order
    for id in (running, posted, *queued):
        assert second.wait(id)["status"] == "completed"
    assert {second.content(id) for id in queued} == {right}
    assert not list((data / "making").iterdir())


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(") ")[1][0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("sign", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_drains_what_is_begun(start_server: StartServer, tmp_path: Path, sign: int) -> None:
    data = tmp_path / "jobs"
    first = start_server(data=data)
    running, queued = first.ask(**SLOW)["id"], first.ask()["id"]
    first.wait(running, in_progress)
    with first.http.stream("GET", f"/v1/videos/{running}/events") as stream:
        synchronous: list[httpx.Response] = []
        waiting = threading.Thread(
            target=lambda: synchronous.append(
                httpx.post(f"{first.url}/v1/videos/sync", json={"prompt": PROMPT})
            )
        )
        waiting.start()
        waited(lambda: len(first.http.get("/v1/videos").json()["data"]) == 3)
        first.process.send_signal(sign)
        with suppress(httpx.RemoteProtocolError):
            for _ in stream.iter_lines():  # ends with the server, and does not keep it
                pass
    assert first.process.wait(60) == 0
    waiting.join()
    assert synchronous[0].status_code == 503 and synchronous[0].json()["error"]["code"] == "stopping"
    states = dict(sqlite3.connect(data / "jobs.sqlite").execute("select id, status from jobs"))
    assert (states[running], states[queued]) == ("completed", "queued")
    second = start_server(data=data)
    assert second.wait(queued)["status"] == "completed"


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(data=tmp_path / "jobs")
    id = server.ask(**LONG)["id"]
    server.wait(id, in_progress)
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(1)
    assert server.stop(signal.SIGTERM) == 0
    server = start_server(data=tmp_path / "jobs")
    server.wait(id, in_progress)
    start = time.monotonic()
    server.http.delete(f"/v1/videos/{id}")
    assert server.stop() == 0 and time.monotonic() - start < 30


@pytest.mark.slow
def test_a_full_disk_refuses_and_loses_nothing(
    start_server: StartServer, tmp_path: Path, pictures: dict[str, Path]
) -> None:
    server = start_server(data=tmp_path / "jobs")
    kept = server.wait(server.ask()["id"])["id"]
    (worker,) = server.workers()
    small = max(p.stat().st_size for p in (tmp_path / "jobs").iterdir() if p.is_file())
    resource.prlimit(
        server.process.pid, resource.RLIMIT_FSIZE, (small // 4096 * 4096, resource.RLIM_INFINITY)
    )
    parts = {"prompt": (None, PROMPT)}
    answers = [server.http.post("/v1/videos", files=parts) for _ in range(5)]
    full = answers[-1]
    assert (full.status_code, full.json()["error"]["code"]) == (507, "storage")
    assert "its disk is full" in full.json()["error"]["message"]
    assert server.get(kept)["status"] == "completed" and server.content(kept)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    taken = [answer.json()["id"] for answer in answers if answer.status_code == 200]
    for id in [*taken, server.ask(pictures["ball"])["id"]]:
        assert server.wait(id)["status"] == "completed"
    assert "Traceback" not in server.log.read_text()
    # A worker that cannot write fails its job, and goes on.
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    failed = server.wait(server.ask()["id"])
    assert (failed["status"], failed["error"]["code"]) == ("failed", "failed")
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert server.wait(server.ask()["id"])["status"] == "completed" and server.workers() == [worker]


@pytest.mark.slow
def test_a_worker_out_of_memory_fails_its_job_and_is_replaced(
    start_server: StartServer, tmp_path: Path, pictures: dict[str, Path]
) -> None:
    from PIL import Image

    server = start_server(data=tmp_path / "jobs")
    (worker,) = server.workers()
    with open(f"/proc/{worker}/statm") as file:
        held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(worker, resource.RLIMIT_AS, (held + 2**27, resource.RLIM_INFINITY))
    large = tmp_path / "large.png"
    Image.new("RGB", (8000, 8000)).save(large)
    id, next_one = server.ask(large)["id"], server.ask(pictures["ball"])["id"]
    video = server.wait(id)
    assert (video["status"], video["error"]["code"]) == ("failed", "out_of_memory")
    assert server.wait(next_one)["status"] == "completed"
    assert server.workers() != [worker]


def test_jobs_are_taken_while_the_bundle_is_loaded(start_server: StartServer, tmp_path: Path) -> None:
    server, worker = _loading(start_server, tmp_path)
    assert server.http.get("/health/ready").status_code == 503
    id = server.ask()["id"]
    assert (server.get(id)["status"], server.get(id)["queue_position"]) == ("queued", 0)
    os.kill(worker, signal.SIGCONT)
    assert server.wait(id)["status"] == "completed"
    assert server.http.get("/health/ready").status_code == 200


def test_a_signal_while_the_bundle_is_loaded_ends_it(start_server: StartServer, tmp_path: Path) -> None:
    server, worker = _loading(start_server, tmp_path)
    assert server.stop() == 0
    assert "error" not in server.log.read_text() and not _alive(worker)


def _loading(start_server: StartServer, folder: Path) -> tuple[Server, int]:
    """A server that answers, and its worker's process, which is held while it loads the bundle."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_server(data=folder / "jobs", port=port)
    (worker,) = waited(server.workers)
    os.kill(worker, signal.SIGSTOP)
    waited(lambda: _live(server))
    return server, worker


def _live(server: Server) -> bool:
    with suppress(httpx.ConnectError):
        return server.http.get("/health/live").status_code == 200
    return False


@pytest.mark.slow
def test_several_bundles_with_several_workers_each(
    start_server: StartServer, bundle: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(bundle, tmp_path / "other")
    server = start_server("--bundle", str(other), "--workers", "2", data=tmp_path / "jobs")
    waited(lambda: server.http.get("/health/ready").json()["workers"] == 4)
    assert [model.id for model in server.openai.models.list()] == ["fake", "other"]
    long = {name: [server.ask(model=name, **LONG)["id"] for _ in range(3)] for name in ("fake", "other")}
    for ids in long.values():  # two at once, of each
        for id in ids[:2]:
            server.wait(id, in_progress)
        assert server.get(ids[2])["queue_position"] == 0
    before = server.workers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    waited(lambda: not set(before) & set(server.workers()))
    waited(lambda: server.http.get("/health/ready").json()["workers"] == 4)
    for ids in long.values():
        for id in ids:  # the third as soon as one of the others is gone
            server.wait(id, in_progress)
            server.http.delete(f"/v1/videos/{id}")
    for name in long:
        video = server.wait(server.ask(model=name)["id"])
        assert (video["status"], video["model"]) == ("completed", name)


# What stops it before it begins: one line each.


def refused(environment: dict[str, str], *options: str) -> tuple[int, str]:
    """Exit code and what it said."""
    command = [sys.executable, "-m", "conceptmaster", "serve", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_what_cannot_work_is_said_in_one_line(
    server: Server, environment: dict[str, str], bundle: Path, tmp_path: Path
) -> None:
    ours = ["--bundle", str(bundle)]
    data = str(server.process.args[server.process.args.index("--data") + 1])  # type: ignore[union-attr, index]
    code, said = refused(environment, *ours, "--port", "0", "--data", data)
    assert (code, said.count("\n")) == (2, 1) and "another server keeps its jobs in" in said
    port = server.url.rpartition(":")[2]
    code, said = refused(environment, *ours, "--port", port)
    assert code == 2 and re.search(rf"cannot listen at 127\.0\.0\.1:{port}: .*--port says another", said)
    code, said = refused(environment, *ours, "--host", "0.0.0.0", "--port", "0")
    assert (code, said.count("\n")) == (2, 1) and "--host 0.0.0.0 lets others in" in said
    code, said = refused(environment, "--bundle", str(tmp_path / "none"))
    assert code == 2 and "none" in said
    code, said = refused(environment, *ours, *ours, "--port", "0")
    assert code == 2 and "two bundles' folders are called" in said
    code, said = refused(environment, *ours, "--port", "0", "--device", "cuda", "--data", str(tmp_path / "c"))
    assert code in (1, 2) and "is not there" in said
    for name, damage in (("later", "pragma user_version=99"), ("foreign", None)):
        folder = tmp_path / name
        folder.mkdir()
        if damage is None:
            (folder / "jobs.sqlite").write_bytes(b"no database" * 1000)
        else:
            sqlite3.connect(folder / "jobs.sqlite").execute(damage)
        code, said = refused(environment, *ours, "--port", "0", "--data", str(folder))
        assert code == 2 and "cannot read the jobs in" in said
    (tmp_path / "stub").mkdir()
    missing = "raise ModuleNotFoundError('none', name='sse_starlette')"
    (tmp_path / "stub" / "sse_starlette.py").write_text(missing)
    path = f"{tmp_path / 'stub'}{os.pathsep}{environment['PYTHONPATH']}"
    code, said = refused(environment | {"PYTHONPATH": path}, *ours, "--port", "0")
    assert code == 1 and "sse_starlette is not installed" in said and "pip install '.[serve]'" in said
    (tmp_path / "file").write_text("")
    code, said = refused(environment, *ours, "--data", str(tmp_path / "file"))
    assert (code, said.count("\n")) == (2, 1) and "cannot keep jobs in" in said
