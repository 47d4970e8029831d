"""GIF and animated WebP, with Pillow: what browsers, chats and documents show as pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WEBP: dict[str, Any] = {"quality": 92, "method": 4}  # lossy, 4:2:0


def save(frames: Iterable[np.ndarray], count: int, fps: float, path: Path, suffix: str) -> None:
    """Writes frames as an endless animation.

    Args: frames: `count` of uint8 [H,W,3] RGB, taken one at a time; suffix: .gif (256 colours a frame) or
        .webp.
    Raises: OSError.
    """
    if suffix == ".gif":  # it counts hundredths of a second, and players take 1 of them for 10
        images = (Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in frames)
        how: dict[str, Any] = {"format": "GIF", "duration": _durations(count, fps, 10, 20)}
    else:
        images = (Image.fromarray(frame) for frame in frames)
        how = {"format": "WEBP", "duration": _durations(count, fps, 1, 1), **WEBP}
    first = next(images)
    first.save(path, save_all=True, append_images=images, loop=0, **how)


def save_still(frame: np.ndarray, path: Path, most: int) -> None:
    """Writes one frame, uint8 [H,W,3] RGB, as WebP, reduced to `most` pixels a side. Raises OSError."""
    image = Image.fromarray(frame)
    image.thumbnail((most, most))
    image.save(path, format="WEBP", **WEBP)


def _durations(count: int, fps: float, unit: int, least: int) -> list[int]:
    """Milliseconds of each frame: it ends at the nearest multiple of `unit`, so that the whole keeps its
    length."""
    ends = [unit * round(1000 / unit * (i + 1) / fps) for i in range(count)]
    return [max(least, end - start) for start, end in zip([0, *ends], ends, strict=False)]
