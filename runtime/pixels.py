"""Frames as a file has them."""

from __future__ import annotations

import numpy as np

from ..errors import GenerationError


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """float32 0..1 → uint8, rounded. Raises GenerationError when it is not finite."""
    if not np.isfinite(frames).all():
        raise GenerationError("the decoded frames are not finite")
    return np.rint(np.clip(frames, 0.0, 1.0) * 255.0).astype(np.uint8)
