"""Pictures that keep their own size, each on a grid of its own: Bernini's references.

Its program (data_utils.py) never enlarges them but to whole patches: the longer side is at most `side`, both
become the nearest multiple of STRIDE, bicubic with antialiasing. Which picture is which the model is told by
a number: 1, 2, …, or, of more than it was trained with, as many numbers evenly from 1 to TRAINED
(wan_diffusion.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .backends import Backend
    from .bundle_format.schema import Manifest

STRIDE = 16
TRAINED = 5


def own_size(size: tuple[int, int], most: int) -> tuple[int, int]:
    """The size in pixels, width and height, that a picture of `size` gets. most: a multiple of STRIDE."""
    scale = max(min(most / max(size), 1.0), 1.0 / min(size))
    found = _scaled(size, scale)
    return _scaled(found, most / max(found)) if max(found) > most else found


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    width, height = (max(STRIDE, round(round(side * scale) / STRIDE) * STRIDE) for side in size)
    return width, height


def sources(count: int) -> np.ndarray:
    """The numbers of so many pictures, float32 [count]."""
    if count > TRAINED:
        return np.linspace(1.0, TRAINED, count, dtype=np.float32)
    return np.arange(1, count + 1, dtype=np.float32)


def own_grids(backend: Backend, frames: dict[int, np.ndarray], manifest: Manifest) -> np.ndarray:
    """Pictures by their number, 0..255 [h,w,3] → float32 [1,1+Cz,N,H,W], H and W of the largest picture: of
    each place its picture's number of `sources`, 0 outside, then latents."""
    assert manifest.conditioning is not None
    side, shapes = manifest.conditioning.side, manifest.shapes
    length = side // shapes.space
    given = np.zeros((1, 1 + shapes.latent[0], shapes.concepts, length, length), np.float32)
    for number, source in enumerate(sources(len(frames))):
        height, width = frames[number].shape[:2]
        given[:, 0, number, : height // shapes.space, : width // shapes.space] = source
        canvas = np.zeros((1, side, side, 3), np.float32)
        canvas[0, :height, :width] = frames[number].astype(np.float32) / 255.0 * 2.0 - 1.0
        area = (given[:, :1, number : number + 1] > 0).astype(np.float32)  # [1,1,1,H,W]
        found = backend.run("encode_first", {"frames": canvas, "area": area})
        latents = backend.to_host(found["latents"])  # [1,Cz,1,H,W]
        given[:, 1:, number] = latents[:, :, 0]
    return given
