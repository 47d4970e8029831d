"""How things are said: verbs, places, backgrounds, adjectives, colours, and words that nobody has read."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

PLACES: dict[tuple[int, int], tuple[str, ...]] = {
    (0, 0): ("at the top left", "in the top left corner", "in the upper left"),
    (1, 0): ("at the top", "up at the top", "at the top centre"),
    (2, 0): ("at the top right", "in the top right corner", "in the upper right"),
    (0, 1): ("on the left", "on the left side", "at the left"),
    (1, 1): ("in the middle", "in the centre", "at the center"),
    (2, 1): ("on the right", "on the right side", "at the right"),
    (0, 2): ("at the bottom left", "in the bottom left corner", "in the lower left"),
    (1, 2): ("at the bottom", "down at the bottom", "at the bottom centre"),
    (2, 2): ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
"""The cells of a frame by (column, row), each in several wordings, the plainest first."""

VERBS: dict[str, tuple[str, ...]] = {
    "left": (
        "moves left",
        "goes left",
        "runs left",
        "rolls left",
        "moves to the left",
        "walks left",
        "slides left",
    ),
    "right": (
        "moves right",
        "goes right",
        "runs right",
        "rolls right",
        "moves to the right",
        "walks right",
        "slides right",
    ),
    "up": ("moves up", "goes up", "runs up", "flies up", "rises", "climbs up"),
    "down": ("moves down", "goes down", "runs down", "falls down", "sinks", "drops down"),
    "still": ("stays still", "does not move", "waits", "stands still", "stays", "rests"),
    "jump": ("jumps", "hops", "leaps", "bounces"),
    "spin": ("spins", "turns around", "rotates", "twirls", "spins around"),
    "grow": ("grows", "gets bigger", "becomes larger", "swells"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "shake": ("shakes", "trembles", "wiggles", "shakes from side to side"),
    "circle": ("circles", "moves in a circle", "goes round in a circle", "flies in a circle"),
}
"""Every motion in several wordings, the plainest first."""

GROUNDS: dict[str, tuple[str, ...]] = {
    "wall": ("in front of a plain wall", "before a wall"),
    "meadow": ("in a meadow", "on the grass", "in a green field"),
    "beach": ("on a beach", "at the beach", "by the sea"),
    "night": ("under a night sky", "at night", "under the stars"),
    "sunset": ("at sunset", "in the evening light"),
    "floor": ("on a checkered floor", "on a chequered floor"),
    "paper": ("on striped paper", "in front of stripes"),
    "hills": ("in the hills", "in a hilly country"),
    "snow": ("in the snow", "on a snowy field"),
    "desert": ("in the desert", "on the sand"),
    "water": ("under water", "in the deep sea"),
    "road": ("on a road", "on the street"),
}
"""Every background in several wordings; a plain colour is told by its name, see ``PLAIN``."""
PLAIN = ("on a plain {} background", "on {}", "on a {} ground", "in front of a {} wall")
SIZES = {"": (), "big": ("big", "large", "huge"), "small": ("small", "little", "tiny")}
LOOSE = ("my", "our", "nice", "funny", "old", "new", "young", "cute", "strange", "happy", "sad", "the other")
"""Adjectives that say nothing of looks."""
ORDINALS = ("first", "second", "third", "fourth")

_HUES = (
    (0.028, "red"),
    (0.105, "orange"),
    (0.18, "yellow"),
    (0.44, "green"),
    (0.53, "turquoise"),
    (0.69, "blue"),
    (0.81, "purple"),
    (0.94, "pink"),
    (1.01, "red"),
)
_ONSETS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl l m n p pl pr qu r s sh sk sl sm sn sp st t th tr tw "
    "v w wh y z zh"
).split()
_VOWELS = "a e i o u a e i o u ai ee oo ou ea oa ie y".split()
_CODAS = "b ck d ff g k l ll m mp n nd ng nk p r rk rn s sh ss st t th tz x zz".split() + [""] * 14


def made_up(rng: np.random.Generator) -> str:
    """A word that probably nobody has read, of one to three syllables."""
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2]))
    return "".join(
        _pick(rng, _ONSETS) + _pick(rng, _VOWELS) + (_pick(rng, _CODAS) if rng.random() < 0.7 else "")
        for _ in range(count)
    )


def colour_name(rgb: Sequence[float] | np.ndarray) -> str:
    """The everyday name of a colour, RGB in 0..1."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(c) for c in rgb))
    if value < 0.2:
        return "black"
    if saturation < 0.15:
        return "white" if value > 0.85 else "grey"
    if 0.02 < hue < 0.13 and value < 0.66:
        return "brown"
    if (hue > 0.9 or hue < 0.03) and saturation < 0.55 and value > 0.7:
        return "pink"
    return next(name for end, name in _HUES if hue < end)


COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "turquoise",
    "blue",
    "purple",
    "pink",
    "brown",
    "grey",
    "black",
    "white",
)
"""All that ``colour_name`` says."""


def article(phrase: str) -> str:
    """``a`` or ``an``."""
    return "an" if phrase[:1].lower() in "aeiou" else "a"


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]
