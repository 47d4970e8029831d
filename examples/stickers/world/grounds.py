"""What pictures stand on: many paintings of every background, made once."""

from __future__ import annotations

import numpy as np

from conceptmaster.examples.sprites.world.draw import paint_background

from .words import COLOURS, GROUNDS, colour_name

EACH = 48
"""Paintings of every background."""
_SPRITES = ("wall", "meadow", "beach", "night", "sunset", "floor", "paper", "hills")
KINDS = (*GROUNDS, *COLOURS)


def banks(seed: int, side: int, each: int | None = None) -> np.ndarray:
    """``each`` (``EACH``) paintings of every one of ``KINDS``, uint8 [K,each,side,side,3]."""
    rng, each = np.random.Generator(np.random.Philox(key=[seed, 102])), each or EACH
    painted = np.stack([np.stack([paint(kind, rng, side) for _ in range(each)]) for kind in KINDS])
    return np.round(painted.clip(0, 1) * 255).astype(np.uint8)


def paint(kind: str, rng: np.random.Generator, side: int) -> np.ndarray:
    """One painting of a background, float32 [side,side,3] in 0..1."""
    if kind in _SPRITES:
        return paint_background(kind, rng, side)
    if kind in COLOURS:
        return np.broadcast_to(_colour(kind, rng), (side, side, 3))
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = np.meshgrid(axis, axis)
    if kind == "snow":
        sky, ground = _near((0.75, 0.84, 0.93), rng), _near((0.95, 0.97, 1.0), rng, 0.03)
        image = _below(sky, ground, y - rng.uniform(0.3, 0.55), side)
        return _spots(image, x, y, rng, 14, np.ones(3, np.float32), side)
    if kind == "desert":
        hill = 0.06 * np.sin(2 * np.pi * (x * rng.uniform(0.7, 1.4) + rng.random()))
        sky, sand = _near((0.98, 0.85, 0.62), rng), _near((0.87, 0.66, 0.36), rng)
        return _below(sky, sand, y - rng.uniform(0.4, 0.65) - hill, side)
    if kind == "water":
        deep, high = _near((0.02, 0.15, 0.4), rng), _near((0.2, 0.65, 0.8), rng)
        image = high * (1 - y[..., None]) + deep * y[..., None]
        return _spots(image, x, y, rng, 8, np.asarray((0.75, 0.92, 1.0), np.float32), side)
    if kind == "road":
        grey, grass = _near((0.42, 0.42, 0.45), rng), _near((0.5, 0.68, 0.36), rng)
        top = rng.uniform(0.3, 0.55)
        image = _below(_near((0.72, 0.86, 0.96), rng), grass, y - top + 0.12, side)
        image = image + (grey - image) * _step(y - top, side)[..., None]
        line = _step(0.02 - np.abs(y - (top + 1) / 2), side) * _step(
            np.sin(2 * np.pi * 4 * x + rng.random()) / 25, side
        )
        return image + (np.float32(0.95) - image) * line[..., None]
    raise ValueError(f"no background is called {kind!r}")


def _colour(name: str, rng: np.random.Generator) -> np.ndarray:
    """A colour of a name."""
    while True:
        rgb = rng.random(3).astype(np.float32)
        if colour_name(rgb) == name:
            return rgb


def _near(rgb: tuple[float, float, float], rng: np.random.Generator, spread: float = 0.08) -> np.ndarray:
    return (np.asarray(rgb, np.float32) + rng.uniform(-spread, spread, 3).astype(np.float32)).clip(0, 1)


def _step(distance: np.ndarray, side: int) -> np.ndarray:
    return np.clip(0.5 + distance * side, 0, 1).astype(np.float32)


def _below(above: np.ndarray, below: np.ndarray, distance: np.ndarray, side: int) -> np.ndarray:
    part = _step(distance, side)[..., None]
    return above * (1 - part) + below * part


def _spots(
    image: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    rng: np.random.Generator,
    count: int,
    colour: np.ndarray,
    side: int,
) -> np.ndarray:
    for _ in range(count):
        distance = np.hypot(x - rng.random(), y - rng.random())
        part = np.clip((rng.uniform(0.008, 0.02) - distance) * side + 0.5, 0, 0.8)[..., None]
        image = image * (1 - part) + colour * part
    return image
