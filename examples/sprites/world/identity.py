"""What makes one sprite itself."""

from __future__ import annotations

import colorsys
import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Identity:
    """What makes one sprite itself; colours: RGB in 0..1, ``period``: sprite units, ``angle``: radians."""

    body: tuple[float, float, float]
    second: tuple[float, float, float]
    accent: tuple[float, float, float]
    texture: str
    period: float
    angle: float
    accessory: str

    @property
    def held_out(self) -> bool:
        """Whether this look is reserved for judging (one cell of eight): a hash of the look, quantised."""
        hue, _, value = colorsys.rgb_to_hsv(*self.body)
        hue2 = colorsys.rgb_to_hsv(*self.second)[0]
        cell = f"{int(hue * 16)}/{int(value * 4)}/{int(hue2 * 8)}/{self.texture}/{self.accessory}"
        return hashlib.sha256(cell.encode()).digest()[0] % 8 == 0
