"""The process that makes videos: `python -m conceptmaster.runtime.workers.worker`, started by process.py.

Reads lines of JSON from standard input: first the options, then tasks and cancels; answers in lines on what
was its standard output, and sends everything else that is printed to standard error. The end of its input is
the end of its server, and so of this process.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...atomic_write import replacing, sync
from ...errors import (
    BundleError,
    Cancelled,
    ConceptMasterError,
    InputError,
    RanksLost,
    RequestWarning,
    is_out_of_memory,
)
from .. import animation
from ..commands import what_the_system_says
from ..logs import keep_quiet
from ..pipeline import Pipeline
from ..request import Concept, Request
from .interface import FRAMES, KINDS, PICTURES, PREVIEW

if TYPE_CHECKING:
    from ..video import Video

BETWEEN_SIGNS = 1.0  # seconds between two signs of life
log = logging.getLogger(__name__)

BETWEEN_PREVIEWS = 0.5  # seconds
PREVIEWS = 0.1  # of the time of a job; each costs a decoded frame
THUMBNAIL = 512  # the longest side in pixels


class Line:
    """The two ends of the talk with the server: what it says, read by a thread, and what it is told."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)  # whoever prints, prints for people
        self.tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.making: str | None = None
        self.cancelled: set[str] = set()
        self.looked: set[str] = set()
        self._lock = threading.Lock()
        self._sign = 0.0  # when the next sign of life is due

    def say(self, what: str, **more: Any) -> None:
        """One line. What the server is no longer there to hear is lost, as this process soon is."""
        with self._lock:
            try:
                self._out.write(json.dumps({"say": what, **more}) + "\n")
            except OSError:
                os._exit(1)

    def live(self) -> None:
        """A sign of life, now and then: whoever hears nothing for long replaces this process."""
        if (now := time.monotonic()) >= self._sign:
            self._sign = now + BETWEEN_SIGNS
            self.say("alive", id=self.making)

    def listen(self) -> None:
        """Until the server is gone; then so is this process, whatever it was making."""
        for text in sys.stdin:
            told = json.loads(text)
            if told.get("do") == "cancel":
                self.cancelled.add(told["id"])
            elif told.get("do") == "look":
                self.looked.add(told["id"])
            else:
                self.tasks.put(told)
        os._exit(0)


def main() -> int:
    """Loads the bundle, then makes task after task."""
    _end_with_parent()
    line = Line()
    threading.Thread(target=line.listen, daemon=True).start()
    options = line.tasks.get()
    logging.basicConfig(level=logging.WARNING, format="conceptmaster: worker: %(message)s")
    if not options.pop("verbose"):
        keep_quiet()
    try:
        pipeline = _open(options)
        pipeline.load()
        _tell_of_graphs(pipeline, line)
    except Exception as error:
        line.say("lost", message=_one_line(error))
        return 1
    line.say("ready")
    while True:
        task = line.tasks.get()
        line.making = task["id"]
        if not _answered(pipeline, line, task):
            return 1


def _end_with_parent() -> None:
    """On Linux also where this process hangs, or is held, and does not see the end of its input."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _open(options: dict[str, Any]) -> Pipeline:
    torch_options = options.pop("options", None)
    if torch_options is not None:
        from ..backends.pytorch.options import TorchOptions

        torch_options = TorchOptions.from_plain(torch_options)
    return Pipeline.from_bundle(options.pop("place"), options=torch_options, **options)


def _tell_of_graphs(pipeline: Pipeline, line: Line) -> None:
    """Every graph that is run is a sign of life."""
    run = pipeline.backend.run

    def told(graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        line.live()
        return run(graph, inputs)

    pipeline.backend.run = told  # type: ignore[method-assign]


def _answered(pipeline: Pipeline, line: Line, task: dict[str, Any]) -> bool:
    """Makes one task; False where this process should not go on."""
    id = task["id"]
    try:
        warned, seconds = _make(pipeline, line, task)
        line.say("done", id=id, warnings=warned, seconds=seconds)
    except Cancelled:
        line.say("cancelled", id=id)
    except RanksLost as error:  # no more of this process: another makes the job
        log.error("%s", error)
        return False
    except Exception as error:
        if is_out_of_memory(error):  # what it holds is best let go with all the rest
            message = "out of memory: ask for fewer videos at once, or for a smaller bundle"
            line.say("failed", id=id, code="out_of_memory", message=message)
            return False
        if isinstance(error, InputError):
            line.say("failed", id=id, code="invalid_request", message=_one_line(error))
        elif isinstance(error, BundleError):
            line.say("failed", id=id, code="damaged_bundle", message=_one_line(error))
        elif isinstance(error, (ConceptMasterError, OSError)):
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            line.say("failed", id=id, code="storage" if full else "failed", message=_one_line(error))
        else:
            traceback.print_exc()
            line.say(
                "failed",
                id=id,
                code="internal_error",
                message="something went wrong: the server's log has it",
            )
    finally:
        line.cancelled.discard(id)
        line.looked.discard(id)
    return True


def _make(pipeline: Pipeline, line: Line, task: dict[str, Any]) -> tuple[list[str], dict[str, float]]:
    """What the task asks for, into its folder; the videos' warnings and seconds by stage."""
    id, folder = task["id"], Path(task["folder"])
    concepts = tuple(Concept(label, Path(path)) for label, path in task["concepts"])
    request = Request(concepts=concepts, **task["request"])
    again = time.monotonic() + BETWEEN_PREVIEWS

    def heard(step: int, steps: int, preview: Any) -> bool:
        nonlocal again
        line.say("step", id=id, step=step, steps=steps)
        wanted = id in line.looked and id not in line.cancelled and step < steps
        if wanted and (start := time.monotonic()) >= again:
            with replacing(folder / PREVIEW) as temporary:
                animation.save_still(preview(), temporary, THUMBNAIL)
            end = time.monotonic()
            again = end + max(BETWEEN_PREVIEWS, (end - start) / PREVIEWS)
            line.say("preview", id=id)
        return id not in line.cancelled

    line.say("begun", id=id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RequestWarning)  # the video has them
        videos = pipeline.generate(request, callback=heard, strict=task["strict"])
    start, written = time.perf_counter(), list[Path]()
    for path in _frames(videos, folder) if task["frames"] else _files(videos, folder):
        line.live()
        if id in line.cancelled:
            raise Cancelled("cancelled while the files were written")
        written.append(path)
    if not task["frames"]:
        with ThreadPoolExecutor() as pool:  # the disk takes them together
            list(pool.map(sync, written))
    seconds = dict(_stages(videos)) | {"write": time.perf_counter() - start}
    return list(videos[0].warnings), {stage: round(value, 4) for stage, value in seconds.items()}


def _files(videos: list[Video], folder: Path) -> Iterator[Path]:
    """Writes KINDS of each; yields each file when it is written."""
    for number, video in enumerate(videos):
        places = {kind: folder / f"{kind}-{number}{suffix}" for kind, suffix in KINDS.items()}
        with places["video"].open("wb") as file:  # nobody sees them before all are there
            video.save(file, format="mp4")
        yield places["video"]
        video.sheet().save(places["spritesheet"], compress_level=1)  # a third of the time, a fifth larger
        yield places["spritesheet"]
        animation.save_still(video.frames[len(video.frames) // 2], places["thumbnail"], THUMBNAIL)
        yield places["thumbnail"]


def _frames(videos: list[Video], folder: Path) -> Iterator[Path]:
    """Writes FRAMES of each, and PICTURES; yields each file when it is written. They are read at once."""
    arrays = {FRAMES.format(number): video.frames for number, video in enumerate(videos)}
    if videos[0].concepts:
        arrays[PICTURES] = np.stack([np.asarray(concept.image) for concept in videos[0].concepts])
    for name, array in arrays.items():
        with (folder / name).open("wb") as file:
            np.save(file, array, allow_pickle=False)
        yield folder / name


def _stages(videos: list[Video]) -> Iterator[tuple[str, float]]:
    for stage, value in videos[0].seconds.items():
        own = stage in ("denoise", "decode")
        yield stage, sum(video.seconds[stage] for video in videos) if own else value


def _one_line(error: Exception) -> str:
    text = what_the_system_says(error) if isinstance(error, OSError) else str(error)
    return " ".join(text.split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
