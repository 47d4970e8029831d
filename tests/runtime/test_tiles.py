"""Tiles of a large video: they cover it, are blended linearly, and their sum is the whole."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptmaster.runtime import tiles
from conceptmaster.runtime.bundle_format.schema import Shapes, Tile

SPACE, TIME = 3, 4


def manifest_of(height: int, width: int, tile: Tile | None, frames: int = 3) -> SimpleNamespace:
    shapes = Shapes(
        concepts=1,
        picture_size=1,
        text_tokens=1,
        label_tokens=1,
        text_width=1,
        queries=1,
        concept_width=1,
        branches=1,
        solver_states=4,
        latent=(2, frames, height, width),
        frames=1 + TIME * (frames - 1),
        height=SPACE * height,
        width=SPACE * width,
    )
    return SimpleNamespace(shapes=shapes, tile=tile)


def enlarge(latents: np.ndarray):
    """A decoder that sees each position alone, and in time the one before: whatever the tiles, the whole."""
    before = np.zeros_like(latents[0, 0])
    for index in range(latents.shape[1]):
        now = latents[0, index] + 0.5 * before
        frame = now.repeat(SPACE, 0).repeat(SPACE, 1)
        yield np.stack([np.stack([frame] * 3, -1)] * (TIME if index else 1)).astype(np.float32)
        before = now


sides = st.integers(4, 40)


@given(sides, sides, st.integers(1, 20))
def test_starts(length: int, tile: int, overlap: int) -> None:
    tile = min(tile, length)
    overlap = min(overlap, tile // 2)
    begins = tiles.starts(length, tile, overlap)
    assert begins[0] == 0 and begins[-1] == length - tile
    gaps = [b - a for a, b in itertools.pairwise(begins)]
    assert all(0 < gap <= tile - overlap for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    fewer = len(begins) - 1
    assert fewer == 0 or fewer * tile - (fewer - 1) * overlap < length


@settings(max_examples=25, deadline=None)
@given(sides, sides, sides, sides, st.integers(1, 3))
def test_the_sum_of_the_tiles_is_the_whole(
    height: int, width: int, high: int, wide: int, frames: int
) -> None:
    high, wide = min(high, height), min(wide, width)
    manifest = manifest_of(height, width, Tile((high, wide), (high // 4, wide // 4)), frames)
    latents = np.random.default_rng(0).random((2, frames, height, width))
    seen = []

    def stream(part: np.ndarray):
        seen.append(part.shape)
        return enlarge(part)

    found = tiles.decode(latents, stream, manifest, tiles.layout(manifest))
    np.testing.assert_allclose(found, np.concatenate(list(enlarge(latents))), rtol=0, atol=1e-6)
    assert set(seen) == {(2, frames, high, wide)}  # one shape: one graph


def test_neighbours_that_disagree_are_blended_linearly() -> None:
    manifest = manifest_of(4, 12, Tile((4, 8), (2, 4)), frames=1)
    given_ = iter((0.0, 1.0))

    def stream(part: np.ndarray):
        yield np.full((1, 4 * SPACE, 8 * SPACE, 3), next(given_), np.float32)

    found = tiles.decode(np.zeros((2, 1, 4, 12)), stream, manifest, tiles.layout(manifest))
    shared = 4 * SPACE
    expected = np.concatenate((np.zeros(shared), (np.arange(shared) + 0.5) / shared, np.ones(shared)))
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None], found.shape), atol=1e-6)


def test_without_tiles_there_is_one() -> None:
    (whole,) = tiles.layout(manifest_of(5, 7, None))
    assert whole.latents == (slice(0, 5), slice(0, 7)) and whole.pixels == (slice(0, 15), slice(0, 21))
    assert whole.weights.shape == (15, 21, 1) and (whole.weights == 1).all()


@pytest.mark.parametrize("overlap", [(0, 2), (1, 3), (-1, 1)])
def test_overlaps_that_cannot_be(overlap: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="overlap must be 1 to half"):
        Tile((4, 4), overlap)
