"""Where a request's videos go: checked before anything is made, written when they are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic_write import check_output, replacing
from ..errors import InputError
from .video_file import SUFFIXES

if TYPE_CHECKING:
    from .request import Request
    from .video import Video


@dataclass(frozen=True)
class Outputs:
    """Files of one request: videos and sheets, one per sample (or no sheets); the frames of all samples."""

    videos: tuple[Path, ...]
    sheets: tuple[Path, ...] = ()
    frames: Path | None = None

    @classmethod
    def of(cls, request: Request, video: str, sheet: str | None, frames: str | None) -> Outputs:
        """The files of `request`, from their names; `{seed}` in a name becomes the sample's seed, otherwise
        several samples are numbered. Raises InputError for what cannot be written."""
        return cls(
            tuple(check_output(path, SUFFIXES) for path in _numbered(video, request)),
            tuple(check_output(path, (".png",)) for path in _numbered(sheet, request)),
            None if frames is None else check_output(Path(frames), (".npy",)),
        )

    def all(self) -> list[Path]:
        """Every file."""
        return [*self.videos, *self.sheets, *([] if self.frames is None else [self.frames])]

    def check_apart(self, read: Iterable[str | os.PathLike[str]]) -> None:
        """Raises InputError for a file that would be written twice, or that is one of those that are read."""
        places = [os.path.realpath(path) for path in self.all()]
        for path, place in zip(self.all(), places, strict=True):
            if places.count(place) > 1:
                raise InputError(f"{str(path)!r} would be written twice: give every output its own name")
        for given in read:
            if os.path.realpath(given) in places:
                raise InputError(f"{str(given)!r} is an input: writing there would destroy it")

    def write(self, videos: list[Video], scale: int | None, chroma: str | None) -> None:
        """Writes them all, each whole or not at all. Raises OSError, and what `Video.save` raises."""
        for video, path in zip(videos, self.videos, strict=True):
            video.save(path, scale=scale, chroma=chroma)
        for video, path in zip(videos, self.sheets, strict=False):
            video.save_sheet(path)
        if self.frames is not None:
            _save_frames(videos, self.frames)


def _numbered(name: str | None, request: Request) -> list[Path]:
    if name is None:
        return []
    path = Path(name)
    if "{seed}" in path.name:
        return [path.with_name(path.name.replace("{seed}", str(seed))) for seed in request.seeds]
    if request.samples == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(request.samples)]


def _save_frames(videos: list[Video], path: Path) -> None:
    import numpy as np

    frames = videos[0].frames if len(videos) == 1 else np.stack([video.frames for video in videos])
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, frames, allow_pickle=False)
