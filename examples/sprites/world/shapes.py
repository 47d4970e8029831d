"""How a sprite is painted: signed distances, layers and one painter function per noun.

A sprite lives in its own coordinates: ``u`` to the right, ``v`` downwards, the body inside the unit circle.
Every layer is a signed distance (negative inside, in sprite units), antialiased over one pixel, so a sprite
can be painted at any size, place and rotation straight onto a pixel grid without resampling.

Coordinates are NumPy arrays, or PyTorch tensors: many sprites of one noun at once, wherever these are (see
``paint_many.py``). What is told of a sprite then has the shape [n, 1, …] instead of being a number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .identity import Identity

Array = Any
"""A NumPy array or a PyTorch tensor; one kind in all arguments of a call."""
Colour = tuple[float, float, float]

DARK: Colour = (0.12, 0.10, 0.14)
WHITE: Colour = (0.97, 0.97, 0.97)
LIGHT: Colour = (0.72, 0.88, 0.97)
BROWN: Colour = (0.45, 0.29, 0.16)
GREEN: Colour = (0.22, 0.55, 0.22)
ORANGE: Colour = (0.98, 0.62, 0.12)
CREAM: Colour = (0.95, 0.90, 0.78)

OUTLINE = 0.09  # outline width in sprite units


def of(array: object) -> Any:
    """The module, numpy or torch, whose functions take ``array``; numpy for plain numbers."""
    torch = sys.modules.get("torch")  # what holds a tensor has imported it
    return torch if torch is not None and isinstance(array, torch.Tensor) else np


def _colour(colour: Colour | Array, like: Array) -> Array:
    """A colour as float32, of the kind that ``like`` is of and where that is."""
    if isinstance(like, np.ndarray):
        return np.asarray(colour, np.float32)
    return like.new_tensor(colour) if isinstance(colour, tuple) else colour


# ---- signed distances: every function takes coordinates of any one shape and returns that shape ----


def circle(u: Array, v: Array, cu: float, cv: float, r: float) -> Array:
    """Distance to a circle."""
    return of(u).sqrt((u - cu) ** 2 + (v - cv) ** 2) - r


def ellipse(u: Array, v: Array, cu: float, cv: float, ru: float, rv: float) -> Array:
    """First-order distance to an axis-aligned ellipse (exact enough for antialiasing)."""
    xp, x, y = of(u), (u - cu) / ru, (v - cv) / rv
    k = xp.sqrt(x * x + y * y)
    slope = xp.sqrt((x / ru) ** 2 + (y / rv) ** 2)
    return k * (k - 1.0) / xp.clip(slope, 1e-6, None)


def box(u: Array, v: Array, cu: float, cv: float, hu: float, hv: float, rounding: float = 0.0) -> Array:
    """Distance to a box of half sizes ``hu``, ``hv`` with rounded corners."""
    xp = of(u)
    x = abs(u - cu) - (hu - rounding)
    y = abs(v - cv) - (hv - rounding)
    outside = xp.sqrt(xp.clip(x, 0, None) ** 2 + xp.clip(y, 0, None) ** 2)
    return outside + xp.clip(xp.maximum(x, y), None, 0) - rounding


def convex(u: Array, v: Array, *corners: tuple[float, float]) -> Array:
    """Distance bound to a convex polygon whose corners run clockwise on screen."""
    result: Array | None = None
    for (au, av), (bu, bv) in zip(corners, corners[1:] + corners[:1], strict=True):
        nu, nv = bv - av, au - bu
        length = float(np.hypot(nu, nv))
        d = ((u - au) * nu + (v - av) * nv) / length
        result = d if result is None else of(u).maximum(result, d)
    assert result is not None
    return result


def star(u: Array, v: Array, r: float, inner: float, points: int = 5) -> Array:
    """Distance bound to a star with ``points`` tips at radius ``r`` and notches at ``inner``."""
    xp, step = of(u), np.pi / points
    angle = xp.arctan2(u, -v)
    folded = abs((angle + step) % (2 * step) - step)
    radius = xp.sqrt(u * u + v * v)
    x, y = radius * xp.sin(folded), radius * xp.cos(folded)
    bu, bv = inner * np.sin(step), inner * np.cos(step)
    # the edge from the tip (0, r) to the notch (bu, bv)
    nu, nv = r - bv, bu
    return (x * nu + (y - r) * nv) / np.hypot(nu, nv)


def union(*distances: Array) -> Array:
    """The union of shapes."""
    result, *others = distances
    for distance in others:
        result = of(result).minimum(result, distance)
    return result


class Canvas:
    """Layers painted over each other on sprite coordinates.

    ``u``, ``v``: float32 of any one shape; ``pixel``: size of one pixel in sprite units. ``rgb`` is
    premultiplied by ``alpha``; both are in 0..1.
    """

    def __init__(self, u: Array, v: Array, pixel: float | Array, look: float | Array) -> None:
        xp = of(u)
        self.u, self.v, self.look = u, v, look
        self.pixel: Any = np.float32(pixel) if xp is np else pixel
        self.alpha = xp.zeros_like(u)
        self.rgb = xp.stack([self.alpha] * 3, -1)

    def fill(self, distance: Array, colour: Colour | Array) -> None:
        """Paint the inside of ``distance`` with one colour or an array of colours."""
        a = of(distance).clip(0.5 - distance / self.pixel, 0.0, 1.0)
        a = a.astype(np.float32) if isinstance(a, np.ndarray) else a
        keep = 1.0 - a
        self.rgb *= keep[..., None]
        self.rgb += a[..., None] * _colour(colour, a)
        self.alpha = self.alpha * keep + a

    def body(self, distance: Array, colour: Colour | Array) -> None:
        """Paint a shape with the dark outline around it."""
        self.fill(distance - OUTLINE, DARK)
        self.fill(distance, colour)

    def eyes(self, cu: float, cv: float, apart: float, r: float) -> None:
        """Two eyes that look where the sprite goes."""
        for side in (-1, 1):
            eye = cu + side * apart
            self.fill(circle(self.u, self.v, eye, cv, r), WHITE)
            self.fill(circle(self.u, self.v, eye + 0.35 * r * self.look, cv + 0.1 * r, 0.58 * r), DARK)


def texture(identity: Identity, u: Array, v: Array, pixel: float | Array) -> Array:
    """The identity's body paint [..., 3]: main colour with its second as stripes, dots, checks or rings."""
    xp, main = of(u), _colour(identity.body, u)
    if identity.texture == "plain":
        return xp.broadcast_to(main, (*u.shape, 3))
    second = _colour(identity.second, u)
    period = identity.period
    c, s = of(identity.angle).cos(identity.angle), of(identity.angle).sin(identity.angle)
    x, y = (u * c + v * s) / period, (v * c - u * s) / period
    if identity.texture == "stripes":
        wave = xp.sin(2 * np.pi * x)
    elif identity.texture == "checks":
        wave = xp.sin(2 * np.pi * x / 1.6) * xp.sin(2 * np.pi * y / 1.6) * 2.0
    elif identity.texture == "dots":
        dx, dy = x - xp.round(x), y - xp.round(y)
        wave = (0.3 - xp.sqrt(dx * dx + dy * dy)) * 6.0
    else:  # rings
        wave = xp.sin(2 * np.pi * xp.sqrt(u * u + v * v) / period)
    mix = xp.clip(0.5 + wave * period / (2 * np.pi * pixel), 0.0, 1.0)[..., None]
    paint = main * (1 - mix) + second * mix
    return paint.astype(np.float32) if xp is np else paint


def accessory(canvas: Canvas, identity: Identity, top: tuple[float, float]) -> None:
    """Paint what the sprite wears at its top."""
    u, v = canvas.u - top[0], canvas.v - top[1]
    colour = identity.accent
    if identity.accessory == "hat":
        canvas.body(union(box(u, v, 0, 0.0, 0.42, 0.06), box(u, v, 0, -0.24, 0.24, 0.24, 0.04)), colour)
    elif identity.accessory == "crown":
        points = [convex(u, v, (c - 0.17, 0.05), (c, -0.40), (c + 0.17, 0.05)) for c in (-0.26, 0.0, 0.26)]
        canvas.body(union(box(u, v, 0, 0.02, 0.42, 0.10), *points), colour)
    elif identity.accessory == "bow":
        left = convex(u, v, (-0.42, -0.30), (0.0, -0.06), (-0.42, 0.18))
        right = convex(u, v, (0.42, 0.18), (0.0, -0.06), (0.42, -0.30))
        canvas.body(union(left, right, circle(u, v, 0, -0.06, 0.12)), colour)


# ---- one painter per noun; each returns where an accessory sits ----


def _ball(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    c.body(circle(c.u, c.v, 0, 0.05, 0.88), paint)
    c.fill(ellipse(c.u, c.v, -0.32, -0.38, 0.20, 0.13), WHITE)
    return 0.0, -0.78


def _star(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    c.body(star(c.u, c.v - 0.05, 1.0, 0.52), paint)
    c.eyes(0, -0.02, 0.20, 0.14)
    return 0.0, -0.82


def _cat(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    ears = union(
        convex(c.u, c.v, (-0.78, -0.05), (-0.70, -0.95), (-0.12, -0.45)),
        convex(c.u, c.v, (0.12, -0.45), (0.70, -0.95), (0.78, -0.05)),
    )
    c.body(union(ears, ellipse(c.u, c.v, 0, 0.18, 0.86, 0.70)), paint)
    c.eyes(0, 0.05, 0.34, 0.19)
    c.fill(convex(c.u, c.v, (-0.13, 0.33), (0.13, 0.33), (0.0, 0.50)), (0.95, 0.45, 0.55))
    return 0.0, -0.50


def _fish(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    c.body(convex(c.u, c.v, (0.35, 0.0), (0.98, -0.55), (0.98, 0.55)), i.second)
    c.body(ellipse(c.u, c.v, -0.18, 0.05, 0.78, 0.56), paint)
    c.fill(circle(c.u, c.v, -0.55, -0.08, 0.17), WHITE)
    c.fill(circle(c.u, c.v, -0.57, -0.08, 0.09), DARK)
    return -0.2, -0.48


def _car(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    shell = union(box(c.u, c.v, 0, 0.22, 0.98, 0.30, 0.12), box(c.u, c.v, -0.05, -0.22, 0.58, 0.32, 0.16))
    c.body(shell, paint)
    c.fill(box(c.u, c.v, -0.32, -0.20, 0.22, 0.19, 0.05), LIGHT)
    c.fill(box(c.u, c.v, 0.24, -0.20, 0.22, 0.19, 0.05), LIGHT)
    for side in (-0.52, 0.52):
        c.fill(circle(c.u, c.v, side, 0.52, 0.29), DARK)
        c.fill(circle(c.u, c.v, side, 0.52, 0.12), WHITE)
    return -0.05, -0.50


def _robot(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    c.body(box(c.u, c.v, 0, 0.55, 0.62, 0.38, 0.08), paint)
    c.body(box(c.u, c.v, 0, -0.22, 0.50, 0.36, 0.10), i.second)
    c.eyes(0, -0.25, 0.22, 0.15)
    c.fill(box(c.u, c.v, 0, 0.02, 0.24, 0.05), DARK)
    return 0.0, -0.60


def _ghost(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    xp = of(c.u)
    hem = c.v - (0.80 + 0.12 * xp.cos(c.u * 9.0))
    side = xp.maximum(abs(c.u) - 0.72, xp.maximum(hem, -0.10 - c.v))
    c.body(union(circle(c.u, c.v, 0, -0.12, 0.72), side), paint)
    c.eyes(0, -0.15, 0.26, 0.19)
    c.fill(ellipse(c.u, c.v, 0, 0.24, 0.12, 0.16), DARK)
    return 0.0, -0.78


def _tree(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    c.body(box(c.u, c.v, 0, 0.68, 0.16, 0.32), BROWN)
    crown = union(
        circle(c.u, c.v, -0.42, 0.10, 0.46),
        circle(c.u, c.v, 0.42, 0.10, 0.46),
        circle(c.u, c.v, 0, -0.40, 0.52),
    )
    c.body(crown, paint)
    return 0.0, -0.85


def _house(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    c.body(box(c.u, c.v, 0, 0.40, 0.70, 0.52), paint)
    c.body(convex(c.u, c.v, (-0.98, -0.08), (0.0, -0.88), (0.98, -0.08)), i.second)
    c.fill(box(c.u, c.v, 0.28, 0.58, 0.17, 0.34), DARK)
    c.fill(box(c.u, c.v, -0.30, 0.40, 0.19, 0.19), LIGHT)
    return 0.0, -0.78


def _mushroom(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    c.body(box(c.u, c.v, 0, 0.52, 0.34, 0.42, 0.16), CREAM)
    c.eyes(0, 0.45, 0.15, 0.11)
    c.body(of(c.u).maximum(ellipse(c.u, c.v, 0, 0.12, 0.95, 0.95), c.v - 0.16), paint)
    return 0.0, -0.76


def _rocket(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    c.fill(convex(c.u, c.v, (-0.26, 0.62), (0.26, 0.62), (0.0, 1.12)), ORANGE)
    fins = convex(c.u, c.v, (-0.78, 0.78), (-0.20, 0.05), (0.20, 0.05), (0.78, 0.78))
    c.body(fins, i.second)
    c.body(ellipse(c.u, c.v, 0, -0.08, 0.44, 0.86), paint)
    c.fill(circle(c.u, c.v, 0, -0.20, 0.20), LIGHT)
    return 0.0, -0.86


def _flower(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    c.body(box(c.u, c.v, 0, 0.70, 0.09, 0.34), GREEN)
    petals = [
        circle(c.u, c.v, 0.46 * np.sin(k * np.pi / 3), -0.16 - 0.46 * np.cos(k * np.pi / 3), 0.32)
        for k in range(6)
    ]
    c.body(union(*petals), paint)
    c.fill(circle(c.u, c.v, 0, -0.16, 0.26), i.second)
    return 0.0, -0.84


def _butterfly(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    halves = ((-0.30, 0.48), (0.44, 0.38))
    wings = [ellipse(c.u, c.v, s * 0.52, cv, 0.46, rv) for s in (-1, 1) for cv, rv in halves]
    c.body(union(*wings), paint)
    c.fill(ellipse(c.u, c.v, 0, 0.05, 0.13, 0.70), DARK)
    c.fill(circle(c.u, c.v, 0, -0.58, 0.20), DARK)
    return 0.0, -0.70


def _bird(c: Canvas, i: Identity, paint: Array) -> tuple[float, float]:
    c.body(convex(c.u, c.v, (0.55, -0.30), (1.02, -0.08), (0.55, 0.12)), ORANGE)
    c.body(convex(c.u, c.v, (-1.0, 0.62), (-0.86, 0.02), (-0.30, 0.30)), i.second)
    c.body(circle(c.u, c.v, -0.02, 0.10, 0.76), paint)
    c.fill(ellipse(c.u, c.v, -0.20, 0.30, 0.36, 0.24), i.second)
    c.fill(circle(c.u, c.v, 0.34, -0.18, 0.19), WHITE)
    c.fill(circle(c.u, c.v, 0.38, -0.18, 0.10), DARK)
    return 0.0, -0.62


PAINTERS: dict[str, Callable[[Canvas, Identity, Array], tuple[float, float]]] = {
    "ball": _ball,
    "star": _star,
    "cat": _cat,
    "fish": _fish,
    "car": _car,
    "robot": _robot,
    "ghost": _ghost,
    "tree": _tree,
    "house": _house,
    "mushroom": _mushroom,
    "rocket": _rocket,
    "flower": _flower,
    "butterfly": _butterfly,
    "bird": _bird,
}


def paint_sprite(
    noun: str, identity: Identity, u: Array, v: Array, pixel: float, look: float = 0.0
) -> tuple[Array, Array]:
    """Paint one sprite on coordinates ``u``, ``v`` (any one shape).

    Returns premultiplied ``rgb`` [..., 3] and ``alpha`` [...], float32 in 0..1. ``pixel`` is one pixel in
    sprite units, ``look`` in -1..1 turns the eyes. Raises KeyError for an unknown noun.
    """
    u, v = u.astype(np.float32), v.astype(np.float32)
    canvas = Canvas(u, v, pixel, look)
    top = PAINTERS[noun](canvas, identity, texture(identity, u, v, pixel))
    accessory(canvas, identity, top)
    return canvas.rgb, canvas.alpha
