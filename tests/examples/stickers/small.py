"""Pictures that tests make do with: drawn here, two of every noun, and some of a held-out set."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.presets import preset
from conceptmaster.examples.stickers.world.atlas import Atlas, Entry, from_pictures

HELD_OUT = ("bell", "car", "moon")
NOUNS = ("apple", "boat", "cloud", "drum", "engine", "fish", "ghost", "hat", "igloo", *HELD_OUT)
COLOURS = (
    "red",
    "blue",
    "lime",
    "orange",
    "purple",
    "teal",
    "gold",
    "navy",
    "pink",
    "brown",
    "gray",
    "black",
)


def picture(number: int, style: int = 0) -> Image.Image:
    """A shape with an eye, in one of three styles."""
    image = Image.new("RGBA", (96, 96))
    draw = ImageDraw.Draw(image)
    colour, second = COLOURS[number], COLOURS[(number + 5 + style) % 12]
    if style:
        colour, second = second, colour
    shapes = [draw.ellipse, draw.rectangle]
    shapes[(number + style) % 2]((8, 8 + 2 * number, 88, 88), fill=colour)
    draw.rectangle((20, 50, 40 + 3 * number, 66), fill=second)
    draw.ellipse((56, 34, 70, 48), fill="white")
    return image


@functools.cache
def atlas() -> Atlas:
    """Twelve nouns, three of them held out by their hash, in two training sets and in a held-out one."""
    made, entries = [], []
    for title, style in (("noto", 0), ("twemoji", 1), ("openmoji", 2)):
        part = from_pictures([(noun, picture(k, style)) for k, noun in enumerate(NOUNS)], title)
        made.append(part.tiles)
        entries += [Entry(noun, (f"{noun} thing",), title) for noun in NOUNS]
    return Atlas(np.concatenate(made), tuple(entries))


def small_config() -> ModelConfig:
    """The preset ``stickers``, small."""
    config = preset("stickers")
    return dataclasses.replace(
        config,
        transformer=dataclasses.replace(config.transformer, num_attention_heads=6, num_layers=2, ffn_dim=96),
        vae=config.vae | {"width": 8, "layers": 1},
    )
