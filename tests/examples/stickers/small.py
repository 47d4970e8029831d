"""Pictures that tests make do with: drawn here, two of every noun, and some of a held-out set."""

from __future__ import annotations

import dataclasses
import functools

from PIL import Image, ImageDraw

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.presets import preset
from conceptmaster.examples.stickers.world.atlas import Atlas, Entry, from_pictures

NOUNS = ("apple", "boat", "cloud", "drum", "engine", "fish", "ghost", "hat", "igloo", "jar", "kite", "lamp")
COLOURS = ("red", "blue", "lime", "orange", "purple", "teal", "gold", "navy", "pink", "brown", "gray", "black")


def picture(number: int, other: bool = False) -> Image.Image:
    """A shape with an eye; ``other`` has other colours and another shape."""
    image = Image.new("RGBA", (96, 96))
    draw = ImageDraw.Draw(image)
    colour, second = COLOURS[number], COLOURS[(number + 5) % 12]
    if other:
        colour, second = second, colour
    shapes = [draw.ellipse, draw.rectangle]
    shapes[(number + other) % 2]((8, 8 + 2 * number, 88, 88), fill=colour)
    draw.rectangle((20, 50, 40 + 3 * number, 66), fill=second)
    draw.ellipse((56, 34, 70, 48), fill="white")
    return image


@functools.cache
def atlas() -> Atlas:
    """Twelve nouns in two training sets, all of them but one trained on, and the same in a held-out set."""
    made, entries = [], []
    for title, other in (("noto", False), ("twemoji", True), ("openmoji", True)):
        part = from_pictures([(noun, picture(k, other)) for k, noun in enumerate(NOUNS)], title)
        made.append(part.tiles)
        entries += [Entry(noun, (f"{noun} thing",), title) for noun in NOUNS]
    import numpy as np

    return Atlas(np.concatenate(made), tuple(entries))


def small_config() -> ModelConfig:
    """The preset ``stickers``, small."""
    config = preset("stickers")
    return dataclasses.replace(
        config,
        transformer=dataclasses.replace(config.transformer, num_attention_heads=6, num_layers=2, ffn_dim=96),
        vae=config.vae | {"width": 8, "layers": 1},
    )
