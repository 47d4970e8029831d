"""The open world's bundle follows pictures and captions that are of no set, by labels that are no words."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from conceptmaster import Concept, Pipeline

COLOURS = {"plorf": (220, 30, 40), "quindle": (30, 60, 220)}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_bundle("stickers", threads=1)


def shape(name: str) -> Image.Image:
    """A disc, or a square, on white."""
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    (draw.ellipse if name == "plorf" else draw.rectangle)((16, 16, 80, 80), fill=COLOURS[name])
    return image


def excess(part: np.ndarray) -> float:
    """How much redder than blue a part of the frames is, of its most coloured pixels."""
    difference = part[..., 0].astype(float) - part[..., 2]
    return float(difference.flat[np.abs(difference).argmax()])


@pytest.mark.parametrize("swapped", [False, True])
def test_each_label_brings_its_own_picture_to_its_own_place(pipeline, swapped):
    right = 0
    for seed in range(4):
        names = [*COLOURS][::-1] if swapped else [*COLOURS]
        concepts = [Concept(label, shape(name)) for label, name in zip(COLOURS, names, strict=True)]
        video = pipeline(
            "a plorf on the left stays still and a quindle on the right stays still, in the snow",
            concepts,
            seed=seed,
        )
        left, other = excess(video.frames[:, :, :56]), excess(video.frames[:, :, 72:])
        right += (left < 0 < other) if swapped else (other < 0 < left)
    assert right >= 3


def test_the_caption_tells_the_background(pipeline):
    frames = {
        ground: pipeline(
            f"a plorf at the top stays still, {ground}", [Concept("plorf", shape("plorf"))]
        ).frames
        for ground in ("in a meadow", "under a night sky", "on a plain white background")
    }
    low = {ground: video[:, 96:].mean((0, 1, 2)) for ground, video in frames.items()}
    assert low["under a night sky"].max() < 80 and low["on a plain white background"].min() > 180
    red, green, blue = low["in a meadow"]
    assert green > red and green > blue


def test_any_word_will_do(pipeline):
    video = pipeline(
        "a plorf in the middle spins, in the snow", [Concept("plorf", shape("plorf"))], strict=True
    )
    assert video.frames.shape == (17, 128, 128, 3) and not video.warnings
