"""Videos as frames, by PyAV, whoever made them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conceptmaster.errors import InputError
from conceptmaster.untrusted import printable

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
MOST_BYTES = 8 * 2**30  # of frames in memory
LEAST_SIDE = 16  # pixels; flow needs no fewer


@dataclass(frozen=True)
class Clip:
    """frames: uint8 [F,H,W,3], RGB; fps: as the file says, 0 where it does not."""

    frames: np.ndarray
    fps: float


def find(folder: Path, name: str) -> Path | None:
    """The video of a sample in a folder: NAME.mp4, or another suffix; None where there is none.

    Raises: InputError where there are several.
    """
    found = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise InputError(f"several videos of {name!r}: {', '.join(path.name for path in found)}; leave one")
    return found[0] if found else None


def read(path: Path) -> Clip:
    """All frames of a video. Raises ValueError, one line, for what cannot be decoded."""
    import av

    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no video")
            stream = container.streams.video[0]
            size = 0
            for frame in container.decode(stream):
                frames.append(frame.to_ndarray(format="rgb24"))
                size += frames[-1].nbytes
                if size > MOST_BYTES:
                    raise ValueError(f"its frames take more than {MOST_BYTES // 2**30} GB")
            rate = stream.average_rate
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"it cannot be decoded: {printable(reason, 200)}") from None
    if not frames:
        raise ValueError("it has no frame")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError("its frames have different sizes")
    height, width = frames[0].shape[:2]
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"its frames are of {width}×{height}, less than {LEAST_SIDE} pixels a side")
    return Clip(np.stack(frames), float(rate) if rate else 0.0)
