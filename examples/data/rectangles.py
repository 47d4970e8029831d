"""Boxes, in shares of the frame's sides, and what they show."""

from __future__ import annotations

import numpy as np

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1: left, top, right and bottom, 0 to 1."""


def area(box: Box) -> float:
    """Of a box, in shares of the frame."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, 0 for empty ones."""
    both = (max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
    inside = area(both)
    whole = area(one) + area(other) - inside
    return inside / whole if whole > 0 else 0.0


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box around a mask bool [H,W]: x0, y0, x1, y1 in shares of its sides; zeros around nothing."""
    if not mask.any():
        return (0.0, 0.0, 0.0, 0.0)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    height, width = mask.shape
    x0, y0, x1, y1 = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
    return (float(x0), float(y0), float(x1), float(y1))


def crop(frame: np.ndarray, box: Box) -> np.ndarray:
    """What a box shows of a frame: uint8 [h,w,3], at least a pixel."""
    x0, y0, x1, y1 = pixels(box, frame.shape)
    return frame[y0:y1, x0:x1]


def pixels(box: Box, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A box in whole pixels of a frame [H,W,…], at least one each way: x0, y0, x1, y1."""
    height, width = shape[:2]
    x0, y0 = min(int(box[0] * width), width - 1), min(int(box[1] * height), height - 1)
    return (
        x0,
        y0,
        max(x0 + 1, min(width, round(box[2] * width))),
        max(y0 + 1, min(height, round(box[3] * height))),
    )
