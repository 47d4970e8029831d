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


def middle(video: np.ndarray) -> np.ndarray:
    """Where redness is in each frame, x and y in 0..1, [F,2]."""
    redness = np.clip(video[..., 0].astype(float) - video[..., 1:3].max(-1) - 40, 0, None)  # [F,H,W]
    whole = redness.sum((1, 2))
    rows, columns = np.linspace(0, 1, video.shape[1]), np.linspace(0, 1, video.shape[2])
    return np.stack([(redness.sum(1) @ columns) / whole, (redness.sum(2) @ rows) / whole], 1)


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moves left", 0, -1), ("moves right", 0, 1), ("moves up", 1, -1), ("moves down", 1, 1)],
)
def test_the_caption_tells_the_motion(pipeline, motion, axis, sign):
    right = 0
    for seed in range(3):
        video = pipeline(
            f"a plorf in the middle {motion}, in the snow", [Concept("plorf", shape("plorf"))], seed=seed
        )
        path = middle(video.frames)
        gone = (path[-1] - path[0]) * sign
        right += gone[axis] > 0.1 and gone[axis] > 2 * abs(gone[1 - axis])
    assert right >= 2


@pytest.mark.parametrize(
    ("box", "low", "high"), [((0, 0.3, 0.4, 0.8), 0, 0.45), ((0.6, 0.3, 1, 0.8), 0.55, 1)]
)
def test_a_box_tells_where_a_concept_is(pipeline, box, low, high):
    """No caption does."""
    inside = 0
    for seed in range(4):
        video = pipeline(
            "a plorf stays still, in the snow",
            [Concept("plorf", shape("plorf"))],
            seed=seed,
            boxes={"plorf": box},
        )
        inside += bool(low <= middle(video.frames)[:, 0].mean() <= high)
    assert inside >= 3


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
