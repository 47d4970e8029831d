"""A worker that is a process: what it makes, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.request import Concept, Request
from conceptmaster.runtime.workers import process
from conceptmaster.runtime.workers.interface import FRAMES, PICTURES, JobFailed, Task, WorkerLost
from conceptmaster.runtime.workers.process import ProcessWorker

pytestmark = pytest.mark.anyio
OPTIONS = {"device": "cpu", "backend": "onnxruntime", "precision": None, "threads": 1, "verbose": False}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def worker(bundle: Path) -> ProcessWorker:
    return ProcessWorker("fake", {**OPTIONS, "options": None, "place": str(bundle)})


async def test_frames_are_what_the_pipeline_makes(
    worker: ProcessWorker, bundle: Path, pictures: dict[str, Path], tmp_path: Path
) -> None:
    folder, said = tmp_path / "made", list[dict[str, Any]]()
    folder.mkdir()
    await worker.start()
    asked = {"prompt": "a ball rolls left", "samples": 2, "seed": 5}
    concepts = (("ball", pictures["ball"]), ("cat", pictures["cat"]))
    try:
        made = await worker.make(Task("a", asked, concepts, folder, frames=True), said.append)
        with pytest.raises(JobFailed, match="'cat'") as failed:
            await worker.make(Task("b", asked, concepts, folder, frames=True, strict=True), said.append)
    finally:
        await worker.stop()
    assert failed.value.code == "invalid_request"
    request = Request("a ball rolls left", tuple(Concept(*c) for c in concepts), samples=2, seed=5)
    with pytest.warns(match="'cat'"):
        videos = Pipeline.from_bundle(bundle, threads=1).generate(request)
    assert made["warnings"] == list(videos[0].warnings)
    for number, video in enumerate(videos):
        np.testing.assert_array_equal(np.load(folder / FRAMES.format(number)), video.frames)
    seen = [np.asarray(concept.image) for concept in videos[0].concepts]
    np.testing.assert_array_equal(np.load(folder / PICTURES), seen)
    assert {"say": "alive", "id": "a"} in said and {path.suffix for path in folder.iterdir()} == {".npy"}


async def test_a_bundle_that_does_not_load_in_time_is_no_worker(
    worker: ProcessWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LOADING", 0.01)
    with pytest.raises(WorkerLost, match="did not load its bundle in 0.01 seconds"):
        await worker.start()
    assert worker.pid is None


STARTS = """\
import asyncio, json, sys
from conceptmaster.runtime.workers.process import ProcessWorker

async def main():
    worker = ProcessWorker("fake", json.loads(sys.argv[1]))
    await worker.start()
    print(worker.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the end of its input ends it")
async def test_a_process_that_is_held_ends_with_the_one_that_started_it(bundle: Path) -> None:
    options = json.dumps({**OPTIONS, "options": None, "place": str(bundle)})
    with subprocess.Popen(
        [sys.executable, "-c", STARTS, options], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        os.kill(pid, signal.SIGSTOP)
        starter.kill()
    async with asyncio.timeout(60):
        while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
            await asyncio.sleep(0.01)


async def test_a_process_that_is_held_can_be_stopped(worker: ProcessWorker) -> None:
    await worker.start()
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await asyncio.wait_for(worker.stop(), 30)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
