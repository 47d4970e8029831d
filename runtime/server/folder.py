"""The folder behind `--data`: the jobs' database, the pictures that were sent, the videos that were made.

jobs.sqlite       see jobs.py
pictures/SHA256   what clients sent, by what it is, so that nothing of a request names a file
making/JOB-TRY    what a worker is writing, each in a folder of its own, so that what an earlier worker still
                  writes counts for nothing; moved to videos/JOB when all of it is there
videos/JOB/       video-0.mp4, thumbnail-0.webp, spritesheet-0.png, …, preview.webp while it is made
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...atomic_write import sync
from ...errors import InputError
from ..workers.interface import KINDS, PREVIEW

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SHA256 = re.compile(r"[0-9a-f]{64}")


class Folder:
    """Opens the folder for one server. Raises InputError where another has it, or it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.pictures, self.making, self.videos = (self.path / n for n in ("pictures", "making", "videos"))
        self._tries: dict[str, Path] = {}
        try:
            for folder in (self.path, self.pictures, self.making, self.videos):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a")  # noqa: SIM115 - held until the end
        except OSError as error:
            raise InputError(f"cannot keep jobs in {str(path)!r}: {error.strerror}") from None
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another server keeps its jobs in {str(path)!r}: stop it first") from None

    @property
    def database(self) -> Path:
        """Where the jobs are."""
        return self.path / "jobs.sqlite"

    def receive(self, pictures: Sequence[bytes]) -> list[tuple[str, Path]]:
        """Writes pictures, each under a name of its own that nobody else deletes; returns that and its
        SHA-256. Raises OSError."""
        names = [self.pictures / f"received-{secrets.token_hex(16)}" for _ in pictures]
        try:
            for data, path in zip(pictures, names, strict=True):
                path.write_bytes(data)
                sync(path)
        except OSError:
            for path in names:
                path.unlink(missing_ok=True)
            raise
        return [(hashlib.sha256(data).hexdigest(), path) for data, path in zip(pictures, names, strict=True)]

    def keep(self, received: Iterable[tuple[str, Path]]) -> None:
        """Gives pictures the names that jobs know them by. Raises OSError."""
        for digest, path in received:
            os.replace(path, self.picture(digest))

    def picture(self, digest: str) -> Path:
        """Where a picture is."""
        assert SHA256.fullmatch(digest)
        return self.pictures / digest

    def drop_pictures(self, digests: list[str]) -> None:
        """Deletes pictures that no job has any more."""
        for digest in digests:
            self.picture(digest).unlink(missing_ok=True)

    def begin(self, job: str) -> Path:
        """An empty folder for what a worker makes, which no worker before has had."""
        self.drop(job)
        place = self._tries[job] = self.making / f"{job}-{secrets.token_hex(8)}"
        place.mkdir(mode=0o700)
        return place

    def finish(self, job: str) -> None:
        """All of a job's files are there: from now on they are what clients get."""
        self.preview(job).unlink(missing_ok=True)
        shutil.rmtree(self.videos / job, ignore_errors=True)
        os.replace(self._tries.pop(job), self.videos / job)

    def drop(self, job: str) -> None:
        """Deletes what was made of a job."""
        for folder in (self._tries.pop(job, None), self.videos / job):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def result(self, job: str, kind: str, sample: int) -> Path:
        """A file of a finished job; kind: of KINDS."""
        return self.videos / job / f"{kind}-{sample}{KINDS[kind]}"

    def preview(self, job: str) -> Path:
        """The newest preview of a job that is being made."""
        return self._tries.get(job, self.making) / PREVIEW

    def sweep(self, jobs: set[str], pictures: set[str]) -> None:
        """Deletes what no job has: a server that was killed leaves it."""
        shutil.rmtree(self.making, ignore_errors=True)
        self.making.mkdir(mode=0o700, exist_ok=True)
        for path in self.videos.iterdir():
            if path.name not in jobs:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.pictures.iterdir():
            if path.name not in pictures:
                with suppress(OSError):
                    path.unlink()

    def close(self) -> None:
        """Lets another server have the folder."""
        self._lock.close()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
