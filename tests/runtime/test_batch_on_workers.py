"""Batches on workers: what they write is what one pipeline writes, whatever dies.

Here the workers are processes of this machine; workers/test_batch_on_ray.py has them on nodes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from conceptmaster.cli import main
from conceptmaster.runtime.workers import on_ray
from conceptmaster.runtime.workers.interface import Hear, JobFailed, Task
from conceptmaster.runtime.workers.process import ProcessWorker

from .test_batch import Batch, arguments, batch, cat, requests, statuses  # noqa: F401

LONG = {"steps": 1000, "samples": 60}  # takes half a minute
ON_PROCESSES = """\
import sys
from conceptmaster import cli
from conceptmaster.runtime.workers import on_ray
from conceptmaster.runtime.workers.process import ProcessWorker
on_ray.workers = lambda args, bundle, options, gateway, count: [ProcessWorker(bundle, options)] * count
sys.exit(cli.main())
"""


class Mortal(ProcessWorker):
    """It is killed in the middle of lines, as often as `deaths` says of a line's seed."""

    deaths: ClassVar[dict[int, int]] = {}

    async def make(self, task: Task, hear: Hear) -> dict[str, Any]:
        def heard(said: dict[str, Any]) -> None:
            hear(said)
            if said.get("step") == 5 and self.deaths.get(seed, 0):
                self.deaths[seed] -= 1
                assert self.pid is not None
                os.kill(self.pid, signal.SIGKILL)

        seed = task.request["seed"]
        return await super().make(task, heard)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Mortal]:
    """The workers of the batch that runs."""
    pytest.importorskip("ray")
    found: list[Mortal] = []

    def made(args: Any, bundle: str, options: dict[str, Any], gateway: Any, count: int) -> list[Mortal]:
        found[:] = [Mortal(bundle, options) for _ in range(count)]
        return found

    monkeypatch.setattr(on_ray, "workers", made)
    monkeypatch.setattr(Mortal, "deaths", {})
    return found


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_it_writes_what_one_pipeline_writes(batch: Batch, workers: list[Mortal]) -> None:  # noqa: F811
    requests(
        cat(seed=3, name="one"),
        {"prompt": "a ball rolls left", "samples": 2, "seed": 8, "steps": 2},
        {"prompt": "a ball rolls left", "concepts": [{"label": "cat", "image": "cat.png"}]},
        {"prompt": "ball " * 20},
        {"prompt": "a cat", "concepts": [{"label": "cat", "image": "r.jsonl"}]},
    )
    reports = []
    for folder, more in (("here", ()), ("there", ("--ray", "local", "--jobs", "2"))):
        Path(folder).mkdir()
        outputs = ("--sheet", f"{folder}/{{name}}.png", "--frames", f"{folder}/f-{{name}}.npy")
        reports.append(batch(*outputs, *more, output=f"{folder}/{{name}}.mp4", code=1))
    here, there = reports
    assert statuses(there) == statuses(here) == ["made", "made", "made", "failed", "failed"]
    for mine, its in zip(here["requests"], there["requests"], strict=True):
        assert {**mine, "outputs": 0, "sheets": 0, "frames": 0} == {
            **its,
            "outputs": 0,
            "sheets": 0,
            "frames": 0,
        }
    assert there["requests"][2]["warnings"]
    assert files("there") == files("here") and ".one.mp4.json" in files("here")
    assert all(worker.pid is None for worker in workers)


def test_it_goes_on_with_and_without(batch: Batch, workers: list[Mortal]) -> None:  # noqa: F811
    requests(cat(seed=1))
    assert statuses(batch()) == ["made"]
    requests(cat(seed=1), cat(seed=2))
    assert statuses(batch("--ray", "local")) == ["kept", "made"]
    started = []
    for worker in workers:
        worker.start = lambda: started.append(1)  # type: ignore[assignment, return-value, method-assign]
    requests(cat(seed=1), cat(seed=2), cat(seed=3))
    assert statuses(batch()) == ["kept", "kept", "made"]
    assert statuses(batch("--ray", "local")) == ["kept"] * 3  # which needs no worker
    assert not started


def test_a_line_whose_worker_is_killed_is_made_again(batch: Batch, workers: list[Mortal]) -> None:  # noqa: F811
    requests(*(cat(seed=seed, steps=300) for seed in range(4)))
    batch()
    right = files("out")
    for path in Path("out").iterdir():
        path.unlink()
    Mortal.deaths |= {1: 1, 3: 2}
    report = batch("--ray", "local", "--jobs", "2", code=1)
    assert statuses(report) == ["made", "made", "made", "failed"]
    why = "2 workers died while they made it; the last: the worker's process ended (signal 9)"
    assert report["requests"][3]["reason"] == why and report["said"].count("signal 9") == 4
    assert files("out") == {name: data for name, data in right.items() if "4" not in name}
    assert statuses(batch("--ray", "local")) == ["kept", "kept", "kept", "made"]
    assert files("out") == right


def test_an_interrupt_ends_its_workers(
    batch: Batch,  # noqa: F811
    workers: list[Mortal],
    bundle: Path,
    tmp_path: Path,
) -> None:
    requests(cat(seed=1), *(cat(seed=seed, **LONG) for seed in range(2, 6)))
    given = arguments(bundle, "--ray", "local", output="out/{name}.npy")
    process = subprocess.Popen(
        [sys.executable, "-c", ON_PROCESSES, *given],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline().startswith("out/")
    found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    (worker,) = map(int, found.stdout.split())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "conceptmaster: error: interrupted\n")
    report = json.loads(out.splitlines()[-1])
    status = {line["name"]: line["status"] for line in report["requests"]}
    assert set(status.values()) == {"made", "left"}
    made = [name for name, found in status.items() if found == "made"]
    assert {path.name for path in Path("out").iterdir()} == {
        f for n in made for f in (f"{n}.npy", f".{n}.npy.json")
    }
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--ray", "nowhere"], "--ray must be local, auto, or HOST:PORT"),
        (["--ray", "local", "--jobs", "0"], "--jobs must be 1 to 4096"),
        (["--ray", "local", "--step-timeout", "0"], "--step-timeout must be more than 0"),
        (["--ray", "local", "--device", "moon"], "unknown device 'moon'"),
    ],
)
def test_what_cannot_work_is_one_line(
    batch: Batch,  # noqa: F811
    workers: list[Mortal],
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    word: str,
) -> None:
    requests(cat())
    assert main(arguments(bundle, *more)) == 2
    captured = capsys.readouterr()
    assert word in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert main(["generate", "--prompt", "a cat", "--ray", "local"]) == 2
    assert "--ray goes with --requests: one request is a file of one line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "ends"),
    [("storage", True), ("damaged_bundle", True), ("out_of_memory", False), ("failed", False)],
)
def test_what_every_line_would_meet_ends_it(
    batch: Batch,  # noqa: F811
    workers: list[Mortal],
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    ends: bool,
) -> None:
    async def make(self: Mortal, task: Task, hear: Hear) -> dict[str, Any]:
        raise JobFailed(code, "this is what is said")

    async def start(self: Mortal) -> None: ...

    async def gone(self: Mortal) -> str:
        return str(await asyncio.Event().wait())

    for function in (make, start, gone):
        monkeypatch.setattr(Mortal, function.__name__, function)
    requests(*(cat(seed=seed) for seed in range(5)))
    report = batch("--ray", "local", code=1)
    assert "this is what is said" in report["said"]
    assert (report["left"] > 0) == ends and (report["failed"] == 5) != ends


def test_workers_that_do_not_come_up_end_it(
    batch: Batch,  # noqa: F811
    workers: list[Mortal],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(
        args: Any, bundle: str, options: dict[str, Any], gateway: Any, count: int
    ) -> list[ProcessWorker]:
        return [ProcessWorker(bundle, {**options, "place": "/nowhere"})]

    monkeypatch.setattr(on_ray, "workers", broken)
    requests(cat(), cat(seed=2))
    report = batch("--ray", "local", code=1)
    assert report["left"] == 2 and "no worker came up: " in report["said"] and "/nowhere" in report["said"]
