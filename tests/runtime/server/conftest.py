"""Servers that are processes, with a bundle that computes for milliseconds, and clients that others wrote."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import conceptmaster
from conceptmaster.benchmarks.ray_nodes import Nodes
from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.server.command import NEEDED

pytest.importorskip("openai")
for name in NEEDED:
    pytest.importorskip(name)
import httpx  # noqa: E402
from openai import OpenAI  # noqa: E402

PATIENCE = 120.0  # seconds that a test waits for what takes a moment on a machine of its own
PROMPT = "a ball rolls left"
LONG = {"steps": "1000", "n": "60"}  # a request that takes half a minute


class Server:
    """A running `conceptmaster serve`."""

    def __init__(self, process: subprocess.Popen[str], log: Path, url: str, api_key: str = "none") -> None:
        self.process, self.log, self.url = process, log, url
        self.http = httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False)
        self.openai = OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE)

    def workers(self) -> list[int]:
        """Its workers' process ids."""
        pid = self.process.pid
        found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
        return [int(word) for word in found.stdout.split()]

    def ask(self, picture: Path | None = None, **fields: str) -> dict[str, Any]:
        """A video that is asked for with a form."""
        given = {"prompt": PROMPT, **({} if picture is None else {"label": "ball"}), **fields}
        parts: list[Any] = [(name, (None, value)) for name, value in given.items()]
        if picture is not None:
            parts.append(("input_reference", (picture.name, picture.read_bytes())))
        answer = self.http.post("/v1/videos", files=parts)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, id: str) -> dict[str, Any]:
        """A video as it is now."""
        return self.http.get(f"/v1/videos/{id}").json()

    def wait(self, id: str, until: Callable[[dict[str, Any]], object] | None = None) -> dict[str, Any]:
        """A video once it has ended, or is as it was waited for."""
        until = until or (lambda video: video["status"] not in ("queued", "in_progress"))
        return waited(lambda: (video := self.get(id)) and until(video) and video)

    def content(self, id: str) -> bytes:
        """A finished video's file."""
        answer = self.http.get(f"/v1/videos/{id}/content")
        assert answer.status_code == 200, answer.text
        return answer.content

    def stop(self, sign: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(sign)
        return self.process.wait(PATIENCE)


def waited(found: Callable[[], Any]) -> Any:
    """What `found` returns as soon as that is something."""
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < end, "this takes too long"
        time.sleep(0.02)
    return value


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In which Python finds this package."""
    path = tmp_path_factory.mktemp("path")
    (path / "conceptmaster").symlink_to(Path(conceptmaster.__file__).parent)
    return os.environ | {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}


Start = Callable[..., Any]


@pytest.fixture(scope="session")
def serving(
    bundle: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """`with serving("--option", …, data=folder) as server:`; it ends with the block if it still runs. With a
    port it is given before it is ready. more: of its environment."""

    @contextmanager
    def start(
        *options: str,
        data: Path | None = None,
        api_key: str = "none",
        port: int = 0,
        more: Mapping[str, str] | None = None,
    ) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("log") / "stderr"
        keep = [] if data is None else ["--data", str(data)]
        command = [
            sys.executable,
            "-m",
            "conceptmaster",
            "serve",
            "--port",
            str(port),
            "--bundle",
            str(bundle),
        ]
        with log.open("w") as errors:
            process = subprocess.Popen(
                [*command, "--threads", "1", *keep, *options],
                env=environment | dict(more or {}),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{port}"
            if not port:  # it says it when a worker is there
                said = process.stdout.readline()
                assert said.startswith("http://"), log.read_text()
                url = said.split()[0]
            yield Server(process, log, url, api_key)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    return start


@pytest.fixture(scope="session")
def server(serving: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests that leave it well."""
    data = tmp_path_factory.mktemp("data") / "jobs"
    with serving("--callback-host", "127.0.0.1", data=data) as running:
        yield running


@pytest.fixture
def start_server(serving: Start) -> Iterator[Callable[..., Server]]:
    """`start_server("--option", …, data=folder)`, which ends with the test."""
    with ExitStack() as stack:
        yield lambda *options, **more: stack.enter_context(serving(*options, **more))


@pytest.fixture(scope="module")
def right(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """`right(seed, …)`: the file of a video that one process makes."""
    pipeline = Pipeline.from_bundle(bundle, threads=1)

    @cache
    def make(seed: int, **fields: int) -> bytes:
        path = tmp_path_factory.mktemp("right") / "video.mp4"
        pipeline.generate(Request(PROMPT, seed=seed, **fields))[0].save(path)
        return path.read_bytes()

    return make


@pytest.fixture(scope="module")
def nodes(environment: dict[str, str]) -> Iterator[Nodes]:
    """The head of a Ray cluster, which has a CPU."""
    pytest.importorskip("ray")
    with Nodes(environment=environment) as running:
        yield running
