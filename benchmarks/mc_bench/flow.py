"""How much and how smoothly a video moves, by OpenCV's flow: no weights are needed.

Where VBench (arXiv 2311.17982) uses RAFT and AMT-S, here it is DIS (Kroeger et al., arXiv 1603.03590):
numbers are comparable with each other, not with VBench's. The rules are VBench's.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from conceptmaster.errors import how_to_install, not_loaded

FPS = 8.0
"""Frames per second at which motion is judged, as in VBench."""
FASTEST = 0.05
"""Share of a frame's pixels that count, the fastest."""
LIMIT = 6 / 256
"""Motion above so many parts of the shorter side is large."""


def opencv() -> ModuleType:
    """OpenCV. Raises MissingDependency."""
    try:
        import cv2
    except ImportError as error:
        raise not_loaded("OpenCV", how_to_install("mc-bench"), error) from error
    return cv2


def flows(frames: np.ndarray, finder: Any = None) -> Iterator[np.ndarray]:
    """DIS flow from each frame to the next, float32 [H,W,2] (x, y) in pixels. frames: uint8 [F,H,W,3]."""
    cv2 = opencv()
    finder = finder or cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    for before, after in zip(grey, grey[1:], strict=False):
        yield finder.calc(before, after, None)


def speeds(frames: np.ndarray, fps: float) -> np.ndarray:
    """Of each pair of frames, FPS of them a second: the mean length of the flow's fastest FASTEST, in pixels.

    Frames of unknown rate are taken as they are. At least one pair needs two frames; else empty.
    """
    step = max(1, round(fps / FPS)) if fps else 1
    found = []
    for flow in flows(frames[::step]):
        length = np.sort(np.hypot(flow[..., 0], flow[..., 1]), axis=None)
        found.append(length[-max(1, int(FASTEST * length.size)) :].mean())
    return np.array(found, np.float64)


def dynamic_degree(frames: np.ndarray, fps: float) -> dict[str, float]:
    """``dynamic degree``: the mean speed, which is what the paper's numbers look like; ``moves``: 1 where a
    quarter of the pairs are faster than LIMIT, else 0, which is VBench's dynamic degree."""
    found = speeds(frames, fps)
    if not len(found):
        return {"dynamic degree": 0.0, "moves": 0.0}
    many = (found > LIMIT * min(frames.shape[1:3])).sum() >= max(1, round((len(found) + 1) / 4))
    return {"dynamic degree": float(found.mean()), "moves": float(many)}


def smoothness(frames: np.ndarray) -> float:
    """Every second frame is dropped and interpolated from its neighbours; (255 - mean |difference|) / 255.

    1 for a video that stands still, or has fewer than three frames.
    """
    errors = []
    for before, true, after in zip(frames[:-2:2], frames[1:-1:2], frames[2::2], strict=True):
        between = midpoint(before, after)
        errors.append(np.abs(between - true.astype(np.float32)).mean())
    return (255.0 - float(np.mean(errors))) / 255.0 if errors else 1.0


def midpoint(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The frame in the middle of two, float32 [H,W,3]: each moved by half its flow to the other, averaged."""
    cv2 = opencv()
    height, width = before.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    parts = []
    for one, other in ((before, after), (after, before)):
        (flow,) = flows(np.stack([one, other]))
        moved = cv2.remap(
            one.astype(np.float32),
            x - flow[..., 0] / 2,
            y - flow[..., 1] / 2,
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        parts.append(moved)
    return (parts[0] + parts[1]) / 2


def farneback(frames: np.ndarray) -> float:
    """OpenS2V-Eval's motion: Farneback's flow, reduced to 16 columns, its mean over time, then over all,
    without its sign.

    frames: uint8 [F,H,W,3], two or more. Parameters and the swapped colours are theirs
    (`get_motionscore.py`). Motions in opposite directions cancel out.
    """
    cv2 = opencv()
    grey = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in frames]
    small = []
    for before, after in zip(grey, grey[1:], strict=False):
        flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        rows = int(flow.shape[0] * (16 / flow.shape[1]))
        small.append(cv2.resize(flow, (16, max(1, rows)), interpolation=cv2.INTER_AREA))
    return abs(float(np.mean(np.mean(small, axis=0)))) if small else 0.0
