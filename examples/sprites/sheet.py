"""A contact sheet of scored requests: pictures, the true video and the generated ones, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from conceptmaster.runtime.files import replacing
from conceptmaster.runtime.pictures import save_png

TILE = 96
"""Side of a picture or frame on the sheet, in pixels."""
GAP, GROUP_GAP, LINE = 4, 20, 24


@dataclass(frozen=True)
class Row:
    """One request: its caption, N pictures uint8 [s, s, 3], and videos uint8 [F, H, W, 3] by name."""

    caption: str
    pictures: Sequence[np.ndarray]
    videos: Mapping[str, np.ndarray]


def draw_sheet(rows: Sequence[Row]) -> Image.Image:
    """The sheet: under each caption the pictures, then first, middle and last frame of every video.

    All rows have the same numbers of pictures and videos; the names of the videos stand above the columns.
    """
    groups = [_groups(row) for row in rows]
    names = ["pictures", *rows[0].videos]
    width = sum(len(group) * (TILE + GAP) + GROUP_GAP for group in groups[0])
    image = Image.new("RGB", (width, LINE + len(rows) * (LINE + TILE + GAP)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for index, (row, tiles) in enumerate(zip(rows, groups, strict=True)):
        top = LINE + index * (LINE + TILE + GAP)
        draw.text((GAP, top + 2), row.caption, "black", font)
        left = GAP
        for name, group in zip(names, tiles, strict=True):
            if index == 0:
                draw.text((left, 2), name, "gray", font)
            for tile in group:
                image.paste(_tile(tile), (left, top + LINE))
                left += TILE + GAP
            left += GROUP_GAP
    return image


def save_sheet(rows: Sequence[Row], path: Path) -> None:
    """Write the sheet as a PNG, whole or not at all. Raises OSError."""
    with replacing(path) as temporary:
        save_png(draw_sheet(rows), temporary)


def _groups(row: Row) -> list[list[np.ndarray]]:
    return [list(row.pictures), *([v[0], v[len(v) // 2], v[-1]] for v in row.videos.values())]


def _tile(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)
