"""A contact sheet of scored requests: pictures, the true video and the generated ones, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from conceptmaster.atomic_write import replacing
from conceptmaster.runtime.sheet import save_png

from ..world.draw import draw_clip
from ..world.requesting import references
from ..world.scenes import Scene
from .judging import ASKED, NO_BOXES, NO_CONCEPTS, SWAPPED, Result

TILE = 96
"""Side of a picture or frame on the sheet, in pixels."""
GAP, GROUP_GAP, LINE = 4, 20, 24
TITLES = {ASKED: "as asked", NO_CONCEPTS: "no concepts", SWAPPED: "pictures swapped", NO_BOXES: "no boxes"}
"""What a video of a scored request is called on the sheet."""


@dataclass(frozen=True)
class Row:
    """One request: its caption (lines), N pictures uint8 [s, s, 3], and videos uint8 [F, H, W, 3] by name."""

    caption: str
    pictures: Sequence[np.ndarray]
    videos: Mapping[str, np.ndarray]


def scored_row(scene: Scene, result: Result, remark: str = "") -> Row:
    """A scored request, with its seed: its pictures, the true video, then those that ``result`` kept.

    remark: a line of its own above the scene's caption; it must name the seed.
    """
    caption = f"{remark}\n{scene.caption}" if remark else f"seed {scene.seed}: {scene.caption}"
    videos = {TITLES[name]: frames for name, frames in result.videos.items()}
    return Row(caption, references(scene), {"truth": draw_clip(scene)[0], **videos})


def draw_sheet(rows: Sequence[Row]) -> Image.Image:
    """The sheet: under each caption the pictures, then first, middle and last frame of every video, as far as
    it has them.

    All rows have the same numbers of pictures and videos; the names of the videos stand above the columns.
    """
    groups = [_groups(row) for row in rows]
    names = ["pictures", *rows[0].videos]
    width = sum(len(group) * (TILE + GAP) + GROUP_GAP for group in groups[0])
    lines = LINE * max(1 + row.caption.count("\n") for row in rows)
    image = Image.new("RGB", (width, LINE + len(rows) * (lines + TILE + GAP)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for index, (row, tiles) in enumerate(zip(rows, groups, strict=True)):
        top = LINE + index * (lines + TILE + GAP)
        for number, line in enumerate(row.caption.split("\n")):
            draw.text((GAP, top + number * LINE + 2), line, "black", font)
        left = GAP
        for name, group in zip(names, tiles, strict=True):
            if index == 0:
                draw.text((left, 2), name, "gray", font)
            for tile in group:
                image.paste(_tile(tile), (left, top + lines))
                left += TILE + GAP
            left += GROUP_GAP
    return image


def save_sheet(rows: Sequence[Row], path: Path) -> None:
    """Write the sheet as a PNG, whole or not at all. Raises OSError."""
    with replacing(path) as temporary:
        save_png(draw_sheet(rows), temporary)


def _groups(row: Row) -> list[list[np.ndarray]]:
    shown = ([v[k] for k in sorted({0, len(v) // 2, len(v) - 1})] for v in row.videos.values())
    return [list(row.pictures), *shown]


def _tile(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)
