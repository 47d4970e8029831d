"""Looks without end from pictures that there are: mirrored, recoloured, stretched, patterned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PATTERNS = ("none", "stripes", "dots", "checks")
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Look:
    """How a picture is changed before it is drawn; as it stands, not at all.

    flip: left and right. hue: turn in radians around the axis of greys. saturation, value: factors. stretch:
    width over height, in factors. pattern: of ``PATTERNS``, laid over it in ``paint`` (RGB), running at
    ``angle`` with ``period`` in shares of its box.
    """

    flip: bool = False
    hue: float = 0.0
    saturation: float = 1.0
    value: float = 1.0
    stretch: float = 1.0
    pattern: str = "none"
    paint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    angle: float = 0.0
    period: float = 0.3

    def matrix(self) -> np.ndarray:
        """What RGB is multiplied by, float32 [3,3]: out = matrix @ rgb."""
        c, s = np.cos(self.hue), np.sin(self.hue)
        grey = np.ones((3, 1)) @ _LUMA[None]
        across = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / np.sqrt(3)
        third = np.full((3, 3), 1 / 3)
        turn = third + c * (np.eye(3) - third) + s * across
        return (self.value * (grey + self.saturation * (np.eye(3) - grey)) @ turn).astype(np.float32)


def random_look(rng: np.random.Generator) -> Look:
    """A look to train on; four in ten keep their colours."""
    colour = rng.random() < 0.6
    patterned = rng.random() < 0.12
    return Look(
        flip=bool(rng.random() < 0.5),
        hue=float(rng.uniform(-np.pi, np.pi)) if colour else 0.0,
        saturation=float(rng.uniform(0.6, 1.3)) if colour else 1.0,
        value=float(rng.uniform(0.75, 1.1)) if colour else 1.0,
        stretch=float(np.exp(rng.uniform(-0.18, 0.18))) if rng.random() < 0.4 else 1.0,
        pattern=PATTERNS[int(rng.integers(1, len(PATTERNS)))] if patterned else "none",
        paint=tuple(float(c) for c in rng.random(3)),  # type: ignore[arg-type]
        angle=float(rng.uniform(0, np.pi)),
        period=float(rng.uniform(0.18, 0.4)),
    )


def shown_colour(rgb: np.ndarray, look: Look) -> np.ndarray:
    """What becomes of a colour in a look, RGB in 0..1, float32 [3]."""
    return (look.matrix() @ rgb).clip(0, 1)
