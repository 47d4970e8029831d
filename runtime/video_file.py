"""The kinds of files a video can be written as, and how far each can enlarge it: known before anything is
made.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from ..errors import InputError

SMALLEST = 256  # pixels: smaller videos lose their colours in 4:2:0, and players show them tiny or blurred
MOST_SCALE = 64
MOST_PIXELS = 139264 * 256  # of a frame: the most at H.264's highest level, and at VP9's


@dataclass(frozen=True)
class VideoFile:
    """A kind of file.

    side: the most pixels that a frame may be wide or high; enlarges: whether videos below SMALLEST are
    enlarged unless a scale is given; chroma: which subsamplings of colour can be asked for, "420" or "444".
    """

    side: int
    enlarges: bool = True
    chroma: tuple[str, ...] = ()


KINDS = {
    ".mp4": VideoFile(16384, chroma=("420", "444")),  # H.264
    ".webm": VideoFile(16384, chroma=("420", "444")),  # VP9
    ".webp": VideoFile(16383),
    ".gif": VideoFile(65535),
    ".png": VideoFile(65535, enlarges=False),  # a sheet of the frames
    ".npy": VideoFile(2**31, enlarges=False),  # the frames themselves
}
SUFFIXES = tuple(KINDS)


def check_options(suffix: str, scale: int | None, chroma: str | None) -> None:
    """Checks what can be asked of a kind of file, whatever the size of the video.

    Args: suffix: of SUFFIXES; scale: 1 to 64, None for automatic; chroma: "420", "444" or None.
    Raises: InputError; MissingDependency where PyAV comes without the encoder.
    """
    whole = isinstance(scale, numbers.Integral) and not isinstance(scale, bool)
    if scale is not None and not (whole and 1 <= scale <= MOST_SCALE):
        raise InputError(f"scale must be an integer, 1 to {MOST_SCALE}, not {scale!r}")
    offered = KINDS[suffix].chroma
    if chroma is not None and not offered:
        having = ", ".join(name for name, kind in KINDS.items() if kind.chroma)
        raise InputError(f"{suffix} has no choice of chroma: leave it out, or write one of {having}")
    if chroma is not None and chroma not in offered:
        raise InputError(f"chroma must be {' or '.join(offered)}, not {chroma!r}")
    if offered:
        from . import media

        media.check_encoder(suffix)


def enlargement(suffix: str, height: int, width: int, scale: int | None) -> int:
    """How many times a video of height × width pixels is enlarged in a file of this kind.

    Args: scale: as given; None enlarges videos whose smaller side is below 256 pixels, by the smallest whole
        number that makes it at least 256 (as far as the file can hold it), where the kind does so at all.
    Raises: InputError where the frames would be larger than the file can hold.
    """
    kind = KINDS[suffix]
    # .npy is numbers, not pictures: it has no limit of its own
    fits = math.isqrt(MOST_PIXELS // (height * width)) if suffix != ".npy" else MOST_SCALE
    largest = min(kind.side // max(height, width), fits, MOST_SCALE)
    if scale is None:
        wanted = -(-SMALLEST // min(height, width)) if kind.enlarges else 1
        scale = max(1, min(wanted, largest))
    if scale > largest:
        made = f"{width * scale}×{height * scale}"
        where = f"a {suffix} holds frames of at most {kind.side} pixels a side and {MOST_PIXELS:,} in all"
        advice = f"scale can be at most {largest}" if largest else "write .npy"
        raise InputError(f"the video would be {made}, and {where}: {advice}")
    return int(scale)  # NumPy's whole numbers are taken, too
