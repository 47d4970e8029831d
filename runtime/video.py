"""What a pipeline returns."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, overload

import numpy as np

from ..atomic_write import check_output, replacing
from ..errors import InputError
from .request import Concept
from .video_file import SUFFIXES, check_options, enlargement

if TYPE_CHECKING:
    from PIL.Image import Image

REFERENCE = 128  # pixels: the side of a reference picture on a contact sheet
SHOWN, SHOWN_QUALITY = 480, 20  # the most pixels a side in a notebook, and x264's constant rate factor there


@dataclass(frozen=True, eq=False, repr=False)
class Video:
    """Frames and where they came from. A notebook shows it playing.

    frames: uint8 [F,H,W,3] RGB; fps: frames per second; seed: the noise's seed (what was asked for, if the
    caller gave the noise); prompt: the caption; concepts: the concepts as the model saw them, each image a
    uint8 array [px,px,3]; seconds: wall time by stage (load, encode, condition, denoise, decode; the first
    three are shared by the samples of one request); warnings: what was warned of, in one line each.
    Raises: InputError for frames or a rate that are none.
    """

    frames: np.ndarray
    fps: float
    seed: int = 0
    prompt: str = ""
    concepts: tuple[Concept, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        frames, fps = self.frames, self.fps
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.shape[3:] != (3,):
            kind = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames)
            raise InputError(f"a video's frames must be a uint8 array [F,H,W,3], not {kind}")
        if not frames.size:
            raise InputError(f"a video's frames are empty: {list(frames.shape)}")
        if not 0.01 <= fps <= 1000:
            raise InputError(f"a video's frames per second must be 0.01 to 1000, not {fps!r}")

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        prompt = self.prompt if len(self.prompt) <= 40 else f"{self.prompt[:39]}…"
        many = "1 frame" if count == 1 else f"{count} frames"
        return f"<Video: {many} of {width}×{height} at {self.fps:g} a second, seed {self.seed}, {prompt!r}>"

    def _repr_html_(self) -> str:
        """The video itself, for notebooks: an mp4 inside the page, reduced to 480 pixels."""
        from . import media

        height, width = self.frames.shape[1:3]
        scale = enlargement(".mp4", height, width, None)
        reduced = min(1.0, SHOWN / (scale * max(height, width)))
        size = (_even(scale * height * reduced), _even(scale * width * reduced))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            frames = _enlarged(self.frames, scale)
            media.save(frames, self.fps, path, ".mp4", "420", quality=SHOWN_QUALITY, size=size)
            data = base64.b64encode(path.read_bytes()).decode()
        return (
            f'<video controls autoplay loop muted playsinline width="{size[1]}" height="{size[0]}" '
            f'title="{html.escape(self.prompt)}" src="data:video/mp4;base64,{data}"></video>'
        )

    @overload
    def save(
        self,
        path: str | os.PathLike[str],
        *,
        scale: int | None = None,
        format: str | None = None,
        chroma: str | None = None,
    ) -> Path: ...

    @overload
    def save(
        self,
        path: IO[bytes],
        *,
        scale: int | None = None,
        format: str | None = None,
        chroma: str | None = None,
    ) -> None: ...

    def save(
        self,
        path: str | os.PathLike[str] | IO[bytes],
        *,
        scale: int | None = None,
        format: str | None = None,
        chroma: str | None = None,
    ) -> Path | None:
        """Writes the video; a file that is named is written whole or not at all.

        Args: path: where to, or a file open for writing bytes (a pipe, a socket: it need not seek); scale:
            each pixel becomes scale × scale, 1 to 64. None: a video whose smaller side is below 256 pixels is
            enlarged by the smallest whole number that makes it at least 256; sheets and npy are not; format:
            mp4 (H.264), webm (VP9), webp, gif, png (contact sheet of the frames) or npy (uint8 [F,H,W,3]),
            None: what the name ends in; chroma: of mp4 and webm, "420", which all players show and is meant
            by None, or "444", which keeps every colour edge and many browsers do not show.
        Returns: the path, None for an open file.
        Raises: InputError for another ending or format, a missing folder, a scale beyond what the file can
            hold, chroma where there is no choice; MissingDependency for a PyAV without the encoder; OSError
            when writing fails.
        """
        if isinstance(path, (str, os.PathLike)):
            path = Path(path)
            suffix = path.suffix.lower() if format is None else _suffix(format)
            check_output(path, SUFFIXES if format is None else (path.suffix.lower(),))
            times = self._times(suffix, scale, chroma)
            with replacing(path) as temporary:
                self._write(temporary, suffix, times, chroma)
            return path
        name = getattr(path, "name", None)
        if isinstance(path, io.TextIOBase) or not getattr(path, "writable", lambda: hasattr(path, "write"))():
            raise InputError(f"cannot write into {path!r}: give a path, or a file opened with 'wb'")
        if format is None and not (isinstance(name, str) and Path(name).suffix):
            raise InputError(f"an open file without a telling name needs format=, one of {_FORMATS}")
        suffix = _suffix(Path(str(name)).suffix if format is None else format)
        times = self._times(suffix, scale, chroma)
        with tempfile.TemporaryDirectory() as folder:  # mp4's index goes in front when all is written
            whole = Path(folder) / f"video{suffix}"
            self._write(whole, suffix, times, chroma)
            with whole.open("rb") as made:
                shutil.copyfileobj(made, path)
        return None

    def _times(self, suffix: str, scale: int | None, chroma: str | None) -> int:
        check_options(suffix, scale, chroma)
        height, width = self.frames.shape[1:3]
        return enlargement(suffix, height, width, scale)

    def _write(self, path: Path, suffix: str, times: int, chroma: str | None) -> None:
        frames = _enlarged(self.frames, times)
        if suffix in (".mp4", ".webm"):
            from . import media

            media.save(frames, self.fps, path, suffix, chroma or "420")
        elif suffix == ".npy":
            count, height, width, _ = self.frames.shape
            shape = (count, times * height, times * width, 3)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            with path.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for frame in frames:
                    file.write(frame.tobytes())
        elif suffix == ".png":
            from . import sheet

            sheet.save_png(sheet.draw(self.frames, "", (), _columns(len(self.frames)), times), path)
        else:
            from . import animation

            animation.save(frames, len(self.frames), self.fps, path, suffix)

    def sheet(
        self,
        references: Sequence[Concept] | None = None,
        columns: int | None = None,
        scale: int | None = None,
    ) -> Image:
        """One picture of it all: labelled references, the caption, the frames in reading order.

        Args: references: concepts to show, this video's own if None; columns: frames in a row, None for about
            twice as wide as high; scale: times frames are enlarged, None for frames about 160 pixels wide.
        Returns: a PIL image, RGB.
        Raises: InputError for a bad reference, columns or scale.
        """
        from . import pictures, sheet

        for name, value in (("columns", columns), ("scale", scale)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a positive integer, not {value!r}")
        shown = [
            (c.label, pictures.load(c.image, REFERENCE, (255, 255, 255), f"the picture of {c.label!r}"))
            for c in (self.concepts if references is None else references)
        ]
        columns = columns or _columns(len(self.frames))
        return sheet.draw(self.frames, self.prompt, shown, columns, scale)

    def save_sheet(self, path: str | os.PathLike[str]) -> Path:
        """Writes `sheet()` as a PNG, whole or not at all; returns the path. Raises InputError, OSError."""
        from . import sheet

        path = check_output(Path(path), (".png",))
        with replacing(path) as temporary:
            sheet.save_png(self.sheet(), temporary)
        return path


def _enlarged(frames: np.ndarray, scale: int) -> Iterator[np.ndarray]:
    """Each of uint8 [F,H,W,3] as [H·scale,W·scale,3]: one at a time, for all of them may be very large."""
    return (frame.repeat(scale, axis=0).repeat(scale, axis=1) for frame in frames)


def _suffix(format: str) -> str:
    suffix = f".{format.lower().removeprefix('.')}"
    if suffix not in SUFFIXES:
        raise InputError(f"unknown format {format!r}: choose one of {_FORMATS}")
    return suffix


_FORMATS = ", ".join(suffix.removeprefix(".") for suffix in SUFFIXES)


def _even(side: float) -> int:
    return max(2, 2 * round(side / 2))


def _columns(frames: int) -> int:
    return math.ceil(math.sqrt(2 * frames))
