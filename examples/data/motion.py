"""How much a shot moves, by DIS optical flow, and how much contrast its light has."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from .cuts import Dropped
from .films import Film
from .thresholds import Thresholds

SIDE = 320
"""Longer side of the frames that are looked at."""
AT_ONCE = 48
"""Frames of a shot that are looked at, about; those between are left out."""
TOP = 0.05
"""The share of pixels that move most, as in VBench's dynamic degree."""


class Sampled:
    """Some frames of a shot, reduced, at equal distances.

    numbers: of the frames in the video; frames: uint8 [n,H,W,3]; step: frames from one to the next.
    """

    def __init__(self, film: Film, start: int, stop: int):
        self.step = max(1, (stop - start) // AT_ONCE)
        every = (item for item in film.frames(start, stop, SIDE) if (item[0] - start) % self.step == 0)
        self.numbers, frames = zip(*every, strict=True)
        self.frames = np.stack(frames)
        self.grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    @property
    def diagonal(self) -> float:
        """Of a frame, in pixels."""
        return float(np.hypot(*self.grey.shape[1:]))

    def flow(self, one: int, other: int) -> np.ndarray:
        """Where the pixels of one sampled frame went in another, in pixels: float32 [H,W,2]."""
        return np.asarray(self._dis.calc(self.grey[one], self.grey[other], None))


def measure(sampled: Sampled, fps: float) -> tuple[float, float]:
    """Optical flow, its top `TOP` in percent of the diagonal per second, the median over pairs of frames; and
    contrast, the luma's standard deviation in 0..1, the mean over frames."""
    per_second = 100 / sampled.diagonal * fps / sampled.step
    top = []
    for n in range(len(sampled.numbers) - 1):
        size = np.linalg.norm(sampled.flow(n, n + 1), axis=2).ravel()
        most = max(1, round(TOP * size.size))
        top.append(float(np.partition(size, -most)[-most:].mean()) * per_second)
    return float(np.median(top)) if top else 0.0, float(sampled.grey.std(axis=(1, 2)).mean() / 255)


def filter_motion(
    shots: list[dict[str, Any]], film: Film, sampled: dict[int, Sampled], thresholds: Thresholds
) -> tuple[list[dict[str, Any]], Dropped]:
    """Drops shots with low optical flow or low light contrast; the others get their "flow" and "contrast"."""
    kept, dropped = [], []
    for shot in shots:
        flow, contrast = (round(value, 4) for value in measure(sampled[shot["shot"]], film.fps))
        told = shot | {"flow": flow, "contrast": contrast}
        if contrast < thresholds.least_contrast:
            dropped.append({"shot": shot["shot"], "why": "low light contrast", "value": contrast})
        elif flow < thresholds.least_flow:
            dropped.append({"shot": shot["shot"], "why": "low optical flow", "value": flow})
        else:
            kept.append(told)
    return kept, dropped
