"""From a scene to pixels: clips with their masks, and reference pictures of a concept alone."""

from __future__ import annotations

import colorsys

import numpy as np

from .scenes import FRAMES, SIZE, Actor, Identity, Scene
from .shapes import paint_sprite

REACH = 1.45
"""How far a sprite with its accessory and outline reaches from its centre, in sprite units."""


def paint_along(
    noun: str, identity: Identity, radius: float, path: np.ndarray, look: float = 0.0, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Paint a sprite along a path of centres [F, 2] in pixels.

    Returns premultiplied rgb [F, size, size, 3] and alpha [F, size, size]. What leaves the frame is cut off.
    """
    frames = len(path)
    half = int(np.ceil(REACH * radius)) + 1
    corner = np.floor(path).astype(int) - half  # [F, 2]
    window = np.arange(2 * half + 1, dtype=np.float32) + 0.5
    x = (corner[:, :1] + window - path[:, :1]) / radius  # [F, w]
    y = (corner[:, 1:] + window - path[:, 1:]) / radius
    shape = (frames, len(window), len(window))
    u, v = np.broadcast_to(x[:, None, :], shape), np.broadcast_to(y[:, :, None], shape)
    small_rgb, small_alpha = paint_sprite(noun, identity, u, v, 1.0 / radius, look)
    rgb = np.zeros((frames, size, size, 3), np.float32)
    alpha = np.zeros((frames, size, size), np.float32)
    for f, (cx, cy) in enumerate(corner):
        x0, x1 = max(cx, 0), min(cx + len(window), size)
        y0, y1 = max(cy, 0), min(cy + len(window), size)
        if x0 < x1 and y0 < y1:
            rgb[f, y0:y1, x0:x1] = small_rgb[f, y0 - cy : y1 - cy, x0 - cx : x1 - cx]
            alpha[f, y0:y1, x0:x1] = small_alpha[f, y0 - cy : y1 - cy, x0 - cx : x1 - cx]
    return rgb, alpha


def look_of(motion: str) -> float:
    """Where the eyes of a sprite with this motion turn."""
    return {"left": -1.0, "right": 1.0}.get(motion, 0.0)


def _hsv(
    rng: np.random.Generator, hue: tuple[float, float], s: tuple[float, float], v: tuple[float, float]
) -> np.ndarray:
    colour = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1.0, rng.uniform(*s), rng.uniform(*v))
    return np.asarray(colour, np.float32)


def paint_background(kind: str, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """One of the world's backgrounds, float32 [size, size, 3] in 0..1."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)

    def mix(a: np.ndarray, b: np.ndarray, m: np.ndarray) -> np.ndarray:
        return a * (1 - m[..., None]) + b * m[..., None]

    def edge(d: np.ndarray) -> np.ndarray:
        return np.clip(0.5 + d * size, 0, 1)

    if kind == "wall":
        return np.broadcast_to(_hsv(rng, (0, 1), (0.05, 0.35), (0.6, 0.95)), (size, size, 3))
    if kind == "meadow":
        horizon = rng.uniform(0.35, 0.6)
        sky = _hsv(rng, (0.53, 0.62), (0.2, 0.45), (0.85, 1))
        grass = _hsv(rng, (0.24, 0.36), (0.4, 0.7), (0.5, 0.8))
        return mix(mix(sky, np.ones(3, np.float32), y * 0.4), grass, edge(y - horizon))
    if kind == "beach":
        sky = _hsv(rng, (0.52, 0.6), (0.15, 0.35), (0.9, 1))
        sea = _hsv(rng, (0.5, 0.6), (0.5, 0.8), (0.5, 0.8))
        sand = _hsv(rng, (0.1, 0.15), (0.25, 0.5), (0.85, 0.98))
        return mix(mix(sky, sea, edge(y - rng.uniform(0.25, 0.4))), sand, edge(y - rng.uniform(0.55, 0.75)))
    if kind == "night":
        image = mix(
            _hsv(rng, (0.6, 0.75), (0.6, 0.9), (0.08, 0.2)), _hsv(rng, (0.6, 0.75), (0.5, 0.8), (0.2, 0.4)), y
        )
        for _ in range(12):
            d = np.hypot(x - rng.random(), y - rng.random())
            image = mix(image, np.asarray((1, 1, 0.85), np.float32), np.clip(1.2 - d * size, 0, 0.9))
        return image
    if kind == "sunset":
        top = _hsv(rng, (0.7, 0.9), (0.3, 0.6), (0.4, 0.7))
        return mix(top, _hsv(rng, (0.02, 0.12), (0.5, 0.8), (0.9, 1)), y)
    base = _hsv(rng, (0, 1), (0.05, 0.3), (0.65, 0.95))
    if kind == "floor":
        n = float(rng.integers(3, 6))
        wave = np.sin(np.pi * x * n) * np.sin(np.pi * y * n)
        return mix(base, base * rng.uniform(0.75, 0.88), np.clip(0.5 + wave * size / (np.pi * n), 0, 1))
    if kind == "paper":
        n = float(rng.integers(3, 6))
        wave = np.sin(2 * np.pi * n * (x if rng.random() < 0.5 else y))
        return mix(base, base * rng.uniform(0.75, 0.88), np.clip(0.5 + wave * size / (2 * np.pi * n), 0, 1))
    if kind == "hills":
        image = np.broadcast_to(_hsv(rng, (0.5, 0.62), (0.15, 0.4), (0.85, 1)), (size, size, 3))
        hue = rng.uniform(0.2, 0.45)
        for k, height in enumerate((0.45, 0.62, 0.8)):
            ridge = height + 0.08 * np.sin(2 * np.pi * (x * rng.uniform(0.8, 1.6) + rng.random()))
            slope = _hsv(rng, (hue, hue + 0.03), (0.35, 0.5), (0.8 - 0.15 * k, 0.85 - 0.15 * k))
            image = mix(image, slope, edge(y - ridge))
        return image
    raise ValueError(f"no background is called {kind!r}")


def draw_clip(scene: Scene, frames: int = FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """The true video, uint8 [F, H, W, 3], and what shows of every actor, float32 [N, F, H, W] in 0..1."""
    rng = np.random.Generator(np.random.Philox(key=[scene.seed, 7]))
    canvas = np.repeat(paint_background(scene.background, rng)[None], frames, axis=0).astype(np.float32)
    masks = np.zeros((len(scene.actors), frames, SIZE, SIZE), np.float32)
    for n, actor in enumerate(scene.actors):
        path = actor.path(frames)
        rgb, alpha = paint_along(actor.noun, actor.identity, actor.radius, path, look_of(actor.motion))
        keep = 1.0 - alpha
        masks[:n] *= keep
        masks[n] = alpha
        canvas *= keep[..., None]
        canvas += rgb
    return np.round(canvas.clip(0, 1) * 255).astype(np.uint8), masks


def draw_reference(actor: Actor, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """A picture of the concept alone on plain ground, in another scale, rotation, place and pose.

    Returns uint8 [size, size, 3].
    """
    radius = size * rng.uniform(0.27, 0.35)
    centre = size / 2 + rng.uniform(-0.07, 0.07, size=2) * size
    angle, stretch, lean = rng.uniform(-0.5, 0.5), rng.uniform(0.88, 1.14), rng.uniform(-0.15, 0.15)
    axis = np.arange(size, dtype=np.float32) + 0.5
    x, y = np.meshgrid((axis - centre[0]) / radius, (axis - centre[1]) / radius)
    c, s = np.cos(angle), np.sin(angle)
    u, v = x * c + y * s, y * c - x * s
    u = (u + lean * v) * stretch
    v = v / stretch
    rgb, alpha = paint_sprite(actor.noun, actor.identity, u, v, 1.0 / radius, rng.uniform(-1, 1))
    ground = _hsv(rng, (0, 1), (0, 0.15), (0.8, 1.0))
    return np.round((ground * (1 - alpha[..., None]) + rgb).clip(0, 1) * 255).astype(np.uint8)
