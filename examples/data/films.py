"""Reading videos, frame by frame. The only file here that imports PyAV."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import av
import numpy as np

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg")
MOST_PIXELS = 2**26
"""Of a frame: what a file says of itself is not worth more memory."""


class Unreadable(Exception):
    """A video that cannot be decoded; `str(error)` says why, in one line."""


class Film:
    """A video file that has a picture.

    fps: frames a second; width, height: of a frame in pixels. Raises: Unreadable.
    """

    def __init__(self, path: Path):
        self.path = path
        with _decoding(), av.open(str(path)) as container:
            stream = next(iter(container.streams.video), None)
            rate = stream and (stream.average_rate or stream.guessed_rate)
            if stream is None or not rate or not stream.width or not stream.height:
                raise Unreadable("it holds no video")
            if stream.width * stream.height > MOST_PIXELS:
                raise Unreadable(f"its frames are too large, {stream.width}×{stream.height}")
            self.fps, self.width, self.height = float(rate), stream.width, stream.height

    def frames(
        self, start: int, stop: int | None = None, side: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Frames start..stop - 1, each with its number: uint8 [H,W,3], RGB.

        side: reduces frames whose longer side is longer. Raises: Unreadable, also where nothing decodes.
        """
        width, height = self.reduced(side)
        number = -1
        with _decoding(), av.open(str(self.path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if stop is not None and number >= stop:
                    return
                if number >= start:
                    size = {"width": width, "height": height}
                    yield number, frame.reformat(format="rgb24", interpolation="AREA", **size).to_ndarray()
        if number < 0:
            raise Unreadable("it holds no frame")

    def some(self, numbers: Collection[int], side: int | None = None) -> dict[int, np.ndarray]:
        """The frames of these numbers. Raises as `frames`."""
        wanted = set(numbers)
        frames = self.frames(min(wanted), max(wanted) + 1, side)
        return {number: frame for number, frame in frames if number in wanted}

    def reduced(self, side: int | None) -> tuple[int, int]:
        """Width and height of frames that are reduced to `side`."""
        scale = min(1.0, (side or 2**31) / max(self.width, self.height))
        return max(2, round(self.width * scale)), max(2, round(self.height * scale))


class _decoding:
    """What FFmpeg says of a file becomes Unreadable."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (av.FFmpegError, ValueError)) and not isinstance(error, MemoryError):
            told = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreadable(" ".join(told.split())[:300]) from error
