"""Who makes a job: the one interface that a queue knows.

A worker loads one bundle, and makes one job at a time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

KINDS = {"video": ".mp4", "thumbnail": ".webp", "spritesheet": ".png"}
"""The files that are made of each sample, by the names of OpenAI's variants of a video's content."""
PREVIEW = "preview.webp"
"""The newest look at a job that is being made, in its folder."""
FRAMES, PICTURES = "frames-{}.npy", "pictures.npy"
"""Of a task that asks for frames, instead of KINDS: each sample's, uint8 [F,H,W,3], and the concepts'
pictures as the model saw them, uint8 [N,px,px,3], where there are concepts."""


class WorkerLost(Exception):
    """The worker died, or never came up. `str(error)` says what is known of it in one line."""


class JobFailed(Exception):
    """The worker refused the job, and lives. code: a word for programs; `str(error)`: one line for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class JobCancelled(Exception):
    """The worker stopped, as it was told to."""


@dataclass(frozen=True)
class Task:
    """A job as a worker gets it. request: fields of runtime.Request without its concepts; concepts: label and
    picture's file; folder: where its files go; frames: whether these are frames, not KINDS; strict: see
    Pipeline.generate."""

    id: str
    request: dict[str, Any]
    concepts: tuple[tuple[str, Path], ...]
    folder: Path
    frames: bool = False
    strict: bool = False

    def to_json(self) -> dict[str, Any]:
        """What `worker.py` reads."""
        concepts = [[label, str(path)] for label, path in self.concepts]
        return {
            "do": "make",
            "id": self.id,
            "request": self.request,
            "concepts": concepts,
            "folder": str(self.folder),
            "frames": self.frames,
            "strict": self.strict,
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Task:
        """What `to_json` gave."""
        concepts = tuple((label, Path(path)) for label, path in told["concepts"])
        folder = Path(told["folder"])
        return cls(told["id"], told["request"], concepts, folder, told["frames"], told["strict"])


Hear = Callable[[dict[str, Any]], None]
"""Called with what a worker says of a task before its last word: {"say": "begun"}, {"say": "step", "step": n,
"steps": m}, {"say": "preview"}, {"say": "alive"}. A worker says something about every second, but for what it
computes in one piece."""


class Worker(Protocol):
    """Makes jobs of one bundle, one at a time. Another kind, on other machines, has these names, too."""

    bundle: str

    async def start(self) -> None:
        """Loads the bundle. Raises WorkerLost."""

    async def make(self, task: Task, hear: Hear) -> dict[str, Any]:
        """Makes a task; returns {"warnings": […], "seconds": {…}}.

        Raises WorkerLost, JobFailed, JobCancelled.
        """

    async def gone(self) -> str:
        """Waits until it has died while nothing was asked of it; why, in one line."""

    def cancel(self, id: str) -> None:
        """Stops the task of this id, if that is being made, within a step: `make` raises JobCancelled."""

    def look(self, id: str) -> None:
        """Somebody looks: the task of this id, if that is being made, is to have previews from now on."""

    async def stop(self) -> None:
        """Ends it, whatever it does."""


async def last_word(
    answer: Callable[[], Awaitable[dict[str, Any]]], task: Task, hear: Hear
) -> dict[str, Any]:
    """Hears what is said of a task until its last word: what Worker.make gives and raises."""
    while True:
        said = await answer()
        if said.get("id") != task.id:
            continue
        if said["say"] == "done":
            return {"warnings": said["warnings"], "seconds": said["seconds"]}
        if said["say"] == "cancelled":
            raise JobCancelled
        if said["say"] == "failed":
            raise JobFailed(str(said["code"]), str(said["message"]))
        hear(said)
