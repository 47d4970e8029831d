"""What a pipeline returns."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .atomic_write import check_output, replacing
from .request import Concept

if TYPE_CHECKING:
    from PIL.Image import Image

REFERENCE = 128  # pixels: the side of a reference picture on a contact sheet
SUFFIXES = (".mp4", ".gif", ".png", ".npy")


@dataclass(frozen=True, eq=False)
class Video:
    """Frames and where they came from.

    frames: uint8 [F,H,W,3] RGB; fps: frames per second; seed: the noise's seed (what was asked for, if the
    caller gave the noise); prompt: the caption; concepts: the concepts as the model saw them, each image a
    uint8 array [px,px,3]; seconds: wall time by stage (load, encode, condition, denoise, decode; the first
    three are shared by the samples of one request).
    """

    frames: np.ndarray
    fps: float
    seed: int = 0
    prompt: str = ""
    concepts: tuple[Concept, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str], *, scale: int = 1) -> Path:
        """Writes the video, whole or not at all.

        Args: path: .mp4 (H.264), .gif, .png (contact sheet of the frames) or .npy (uint8 [F,H,W,3]); scale:
            each pixel becomes scale × scale.
        Returns: the path.
        Raises: InputError for another ending, a missing folder or a bad scale; OSError when writing fails.
        """
        path = check_output(Path(path), SUFFIXES)
        scale = check_scale(scale)
        frames = self.frames.repeat(scale, axis=1).repeat(scale, axis=2)  # [F,H·scale,W·scale,3]
        suffix = path.suffix.lower()
        with replacing(path) as temporary:
            if suffix == ".mp4":
                from .media import save_mp4

                save_mp4(frames, self.fps, temporary)
            elif suffix == ".npy":
                with temporary.open("wb") as file:
                    np.save(file, frames, allow_pickle=False)
            else:
                from . import pictures

                if suffix == ".gif":
                    pictures.save_gif(frames, self.fps, temporary)
                else:
                    pictures.save_png(pictures.sheet(frames, "", (), _columns(len(frames)), 1), temporary)
        return path

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
        from . import pictures

        for name, value in (("columns", columns), ("scale", scale)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a positive integer, not {value!r}")
        shown = [
            (c.label, pictures.load(c.image, REFERENCE, (255, 255, 255), f"the picture of {c.label!r}"))
            for c in (self.concepts if references is None else references)
        ]
        columns = columns or _columns(len(self.frames))
        return pictures.sheet(self.frames, self.prompt, shown, columns, scale)

    def save_sheet(self, path: str | os.PathLike[str]) -> Path:
        """Writes `sheet()` as a PNG, whole or not at all; returns the path. Raises InputError, OSError."""
        from . import pictures

        path = check_output(Path(path), (".png",))
        with replacing(path) as temporary:
            pictures.save_png(self.sheet(), temporary)
        return path


def check_scale(scale: int) -> int:
    """Returns `scale`. Raises InputError unless it is an integer, 1 to 64."""
    if isinstance(scale, bool) or not isinstance(scale, int) or not 1 <= scale <= 64:
        raise InputError(f"scale must be an integer, 1 to 64, not {scale!r}")
    return scale


def _columns(frames: int) -> int:
    return math.ceil(math.sqrt(2 * frames))
