"""References on one canvas that is the first frame of the video, MAGREF's own way; or tiled on one picture
that the picture encoder sees, as ConceptMaster's paper ran IP-Adapter.

A frame is cut into as many cells as there are references, or a few more, row by row; each reference is
scaled into its cell, uncut (Lanczos), on white. What the model is told of the first latent frame is the area
that references fill, not that all of it is known. The picture encoder sees the whole canvas, as one picture.
So MAGREF's subject2video.py does it (`process_refimg`, `resize_and_pad`), but that it shuffles references and
cells; here the first reference stands in the first cell, the second in the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from . import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

    from .bundle_format.schema import Manifest

GRIDS = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 6: (3, 2), 8: (4, 2)}
"""Columns and rows of a canvas by its number of cells."""
SQUARE = {1: (1, 1), 2: (2, 1), 4: (2, 2), 6: (3, 2), 9: (3, 3)}
"""Of a square one, on which the picture encoder's pictures are tiled."""

Cell = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


def cells(count: int, size: tuple[int, int], grids: Mapping[int, tuple[int, int]] = GRIDS) -> list[Cell]:
    """The cells of a canvas for `count` references, in the order in which they are taken: the fewest of grids
    that are enough, so that of five references one cell stays free.

    size: width and height. Sides are rounded down; the last column and the last row get what is left.
    """
    columns, rows = grids[min(number for number in grids if number >= count)]
    xs = [*(column * (size[0] // columns) for column in range(columns)), size[0]]
    ys = [*(row * (size[1] // rows) for row in range(rows)), size[1]]
    return [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(columns)]


class Canvas:
    """Several references on one picture: a frame of the video, or what the picture encoder sees.

    pixels: uint8 [height,width,3]; filled: bool [height,width], where a reference is.
    """

    def __init__(self, manifest: Manifest, count: int) -> None:
        """An empty one, for `count` references."""
        shapes, self._how, self._side = manifest.shapes, manifest.pictures, manifest.shapes.picture_size
        self.tiled = manifest.pictures.tiled > 0
        width, height = (self._side, self._side) if self.tiled else (shapes.width, shapes.height)
        self.pixels = np.empty((height, width, 3), np.uint8)
        self.pixels[:] = self._how.background
        self.filled = np.zeros((height, width), bool)
        self._space = shapes.space
        self._cells = cells(count, (width, height), SQUARE if self.tiled else GRIDS) if count else []

    def place(self, index: int, image: Image) -> None:
        """Puts reference number `index` into its cell."""
        left, top, right, bottom = self._cells[index]
        size, fit = (right - left, bottom - top), self._how.fit if self.tiled else "centred"
        self.pixels[top:bottom, left:right] = pictures.fit(image, size, fit, self._how.background)
        x, y, width, height = pictures.inside(image.size, size)
        self.filled[top + y : top + y + height, left + x : left + x + width] = True

    def frames(self) -> dict[int, np.ndarray]:
        """Which frames of the video it is, by number."""
        return {} if self.tiled else {0: self.pixels}

    def area(self) -> np.ndarray | None:
        """Which latents of a frame see a pixel that is filled, bool [H,W]."""
        if self.tiled:
            return None
        height, width = (side // self._space for side in self.filled.shape)
        blocks = self.filled.reshape(height, self._space, width, self._space)
        return np.asarray(blocks.any(axis=(1, 3)))  # [H,W]

    def seen(self) -> np.ndarray:
        """The canvas as the picture encoder sees it, 0..255 [px,px,3]."""
        if self.tiled:
            return self.pixels
        image = pictures.read(self.pixels, self._how.background, "the canvas")
        return pictures.prepare(image, self._how, self._side)


def canvas_of(manifest: Manifest, count: int) -> Canvas | None:
    """An empty canvas for a request of `count` references; None for a bundle whose pictures are on none."""
    kind = None if manifest.conditioning is None else manifest.conditioning.kind
    return Canvas(manifest, count) if kind == "canvas" or manifest.pictures.tiled else None
