"""The noise a video starts from: the same numbers for the same seed on every backend and machine."""

from __future__ import annotations

import numpy as np

from ..errors import InputError


def from_seed(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 of `shape` [Cz,F,H,W], from NumPy's counter-based Philox generator."""
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)


def from_array(noise: object, shape: tuple[int, ...], samples: int) -> list[np.ndarray]:
    """Checks noise given by the caller.

    Args: noise: float32 or float64 array [samples,Cz,F,H,W], or [Cz,F,H,W] for one sample; shape: (Cz,F,H,W).
    Returns: one float32 array [Cz,F,H,W] per sample.
    Raises: InputError for another type or shape, or values that are not finite.
    """
    if not isinstance(noise, np.ndarray) or noise.dtype not in (np.float32, np.float64):
        kind = noise.dtype if isinstance(noise, np.ndarray) else type(noise).__name__
        raise InputError(f"noise must be a float32 or float64 array, not {kind}")
    wanted = (samples, *shape)
    if noise.shape != wanted and not (samples == 1 and noise.shape == shape):
        raise InputError(f"noise must have the shape {list(wanted)}, not {list(noise.shape)}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is told below
        values = noise.reshape(wanted).astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError("noise holds values that are not a number, or infinite in float32")
    return list(values)
