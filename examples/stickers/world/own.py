"""Pictures that this project draws itself: the sprites, and cut-outs of shapes that nobody has a name for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from conceptmaster.examples.sprites.world import shapes
from conceptmaster.examples.sprites.world.scenes import random_identity

from .nouns import Noun
from .words import made_up

SPRITES, CUT_OUTS = "sprites", "cut-outs"
EACH_SPRITE, CUT_OUT_COUNT = 20, 240
SIDE = 160
"""Side in pixels at which a picture is painted."""
REACH = 1.9
"""Half the side in the sprites' own units: there is room for what they wear."""


def sprites() -> Iterator[tuple[str, Image.Image]]:
    """``EACH_SPRITE`` pictures of every noun of the sprites, in looks that these are trained on too."""
    rng = np.random.Generator(np.random.Philox(key=[0, 106]))
    u, v = _axes()
    for noun in shapes.PAINTERS:
        for _ in range(EACH_SPRITE):
            look = random_identity(rng, held_out=False)
            yield noun, _picture(*shapes.paint_sprite(noun, look, u, v, 2 * REACH / SIDE))


def cut_outs() -> Iterator[tuple[str, Image.Image]]:
    """``CUT_OUT_COUNT`` figures of a few simple shapes, patterned, each under a word that nobody has read.

    No word is one that is held out.
    """
    rng = np.random.Generator(np.random.Philox(key=[0, 107]))
    u, v = _axes()
    for _ in range(CUT_OUT_COUNT):
        name = made_up(rng)
        while Noun(name, ()).held_out:
            name = made_up(rng)
        canvas = shapes.Canvas(u, v, 2 * REACH / SIDE, 0.0)
        for _ in range(int(rng.integers(2, 5))):
            look = random_identity(rng, held_out=False)
            paint = shapes.texture(look, u, v, 2 * REACH / SIDE)
            outlined = rng.random() < 0.4
            (canvas.body if outlined else canvas.fill)(_shape(rng, u, v), paint)
        yield name, _picture(canvas.rgb, canvas.alpha)


def _axes() -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE * 2 - 1) * REACH
    u, v = np.meshgrid(axis, axis)
    return u, v


def _shape(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A random shape at a random place and angle: its signed distance."""
    angle = rng.uniform(0, 2 * np.pi)
    x, y = u - rng.uniform(-0.5, 0.5), v - rng.uniform(-0.5, 0.5)
    x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    wide, high = rng.uniform(0.25, 0.9, 2)
    kind = rng.integers(4)
    if kind == 0:
        return shapes.ellipse(x, y, 0, 0, wide, high)
    if kind == 1:
        return shapes.box(x, y, 0, 0, wide, high, float(rng.uniform(0, 0.2)))
    if kind == 2:
        return shapes.star(x, y, wide + 0.1, float(rng.uniform(0.35, 0.8)), int(rng.integers(3, 9)))
    waves = rng.uniform(0, 0.3 * wide) * np.sin(int(rng.integers(2, 7)) * np.arctan2(y, x))
    return shapes.circle(x, y, 0, 0, wide) - waves


def _picture(rgb: np.ndarray, alpha: np.ndarray) -> Image.Image:
    """Premultiplied colours and alpha in 0..1 as a picture."""
    plain = rgb / np.maximum(alpha, 1e-6)[..., None]
    pixels = np.concatenate([plain, alpha[..., None]], -1).clip(0, 1)
    return Image.fromarray(np.round(255 * pixels).astype(np.uint8), "RGBA")
