"""A large video decoded in tiles: where they lie, how much each counts where they overlap, and their sum.

Every tile has the same size, so one graph decodes them all; each goes through the whole video with a causal
state of its own, and only one state is in memory. They are spread evenly. Towards a neighbour a tile fades
out over its overlap, linearly and in pixels; the weights of all tiles are one everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .bundle_format.schema import Manifest

Stream = Callable[[np.ndarray], Iterator[np.ndarray]]
"""Latents [Cz,F,H,W] of any region of a tile's size → its frames in order, some at a time, float32
[f,height,width,3] in 0..1."""


@dataclass(frozen=True)
class PlacedTile:
    """One tile: rows and columns of the latents, those of the video, and its weights there, float32
    [height,width,1]."""

    latents: tuple[slice, slice]
    pixels: tuple[slice, slice]
    weights: np.ndarray


def layout(manifest: Manifest) -> list[PlacedTile]:
    """The tiles of a bundle's video, row by row; a single one, of weights 1, where it is decoded whole."""
    shapes, tile = manifest.shapes, manifest.tile
    size = shapes.latent[2:]
    space = shapes.space
    axes = [_axis(length, *(tile.axis(i) if tile else (length, 0)), space) for i, length in enumerate(size)]
    return [
        PlacedTile(
            (rows, columns), (_times(rows, space), _times(columns, space)), (y[:, None] * x)[..., None]
        )
        for (rows, y), (columns, x) in itertools.product(*axes)
    ]


def decode(latents: np.ndarray, stream: Stream, manifest: Manifest, tiles: list[PlacedTile]) -> np.ndarray:
    """Latents [Cz,F,H,W], any F → float32 [frames,height,width,3] in 0..1, the weighted sum of all tiles."""
    shapes = manifest.shapes
    frames = 1 + (latents.shape[1] - 1) * shapes.frames_per_latent
    video = np.zeros((frames, shapes.height, shapes.width, 3), np.float32)
    for tile in tiles:
        rows, columns = tile.latents
        done = 0
        for part in stream(latents[:, :, rows, columns]):  # [f,height,width,3]
            video[done : done + len(part), *tile.pixels] += part * tile.weights
            done += len(part)
    return video


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where as few tiles as possible begin, evenly, so that neighbours share `overlap` at least."""
    count = 1 + max(0, -(-(length - tile) // (tile - overlap)))
    return [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]


def _axis(length: int, tile: int, overlap: int, space: int) -> list[tuple[slice, np.ndarray]]:
    """Of one axis: each tile's latents, and its weights, float32 [tile*space]; per pixel they sum to one."""
    begins = starts(length, tile, overlap)
    pixel = np.arange(tile * space) + 0.5
    raw = []
    for begin in begins:
        up = 1.0 if begin == 0 else pixel / (overlap * space)
        down = 1.0 if begin + tile == length else (tile * space - pixel) / (overlap * space)
        raw.append(np.minimum(np.minimum(up, down), 1.0) * np.ones(tile * space))
    total = np.zeros(length * space)
    for begin, weights in zip(begins, raw, strict=True):
        total[begin * space :][: tile * space] += weights
    return [
        (slice(begin, begin + tile), (weights / total[begin * space :][: tile * space]).astype(np.float32))
        for begin, weights in zip(begins, raw, strict=True)
    ]


def _times(place: slice, space: int) -> slice:
    return slice(place.start * space, place.stop * space)
