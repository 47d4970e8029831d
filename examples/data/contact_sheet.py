"""A picture of what was kept: of every clip a frame with its boxes, and the concepts' pictures on a
chequerboard."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from conceptmaster.atomic_write import replacing
from conceptmaster.runtime.sheet import save_png

from .films import Film
from .pairs import Clip

HEIGHT, LINE, GAP, SQUARE = 144, 18, 8, 8
WIDE = 960
"""Of the sheet, in pixels."""
MOST = 40
"""Clips that are shown."""
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b")


def save(clips: Iterable[Clip], path: Path) -> None:
    """Writes the sheet of the first `MOST` clips as a PNG. Raises OSError, films.Unreadable."""
    rows = [_row(clip) for clip in islice(clips, MOST)]
    height = GAP + sum(row.height + GAP for row in rows)
    sheet = Image.new("RGB", (WIDE, max(height, LINE + 2 * GAP)), "white")
    if not rows:
        ImageDraw.Draw(sheet).text((GAP, GAP), "nothing was kept", "black", ImageFont.load_default(size=12))
    top = GAP
    for row in rows:
        sheet.paste(row, (GAP, top))
        top += row.height + GAP
    with replacing(path) as temporary:
        save_png(sheet, temporary)


def _row(clip: Clip) -> Image.Image:
    row = Image.new("RGB", (WIDE - 2 * GAP, HEIGHT + 2 * LINE), "white")
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(size=12)
    draw.text((0, 0), f"{clip.name}: {clip.caption}"[:150], "black", font)
    left = 0
    shown = sorted({pair.best for pair in clip.pairs})[:2]
    for number, frame in Film(clip.path).some(shown).items():
        image = Image.fromarray(frame)
        boxes = ImageDraw.Draw(image)
        for colour, pair in zip(COLOURS, clip.pairs, strict=False):
            if number in pair.boxes:
                sides = np.array(pair.boxes[number]) * np.tile([image.width, image.height], 2)
                boxes.rectangle(
                    [*sides[:2], *(sides[2:] - 1)], outline=colour, width=max(2, image.height // 90)
                )
        left += _paste(row, image, left)
    for colour, pair in zip(COLOURS, clip.pairs, strict=False):
        with Image.open(pair.image) as opened:
            width = _paste(row, _on_squares(opened.convert("RGBA")), left)
        draw.text((left, LINE + HEIGHT), f"{pair.label} ({pair.name})", colour, font)
        left += max(width, 110)
    return row


def _paste(row: Image.Image, image: Image.Image, left: int) -> int:
    """Puts an image of the row's height there; returns how much room it takes."""
    width = max(1, round(image.width * HEIGHT / image.height))
    row.paste(image.resize((width, HEIGHT), Image.Resampling.LANCZOS), (left, LINE))
    return width + GAP


def _on_squares(picture: Image.Image) -> Image.Image:
    y, x = np.mgrid[0 : picture.height, 0 : picture.width] // max(2, picture.height * SQUARE // HEIGHT)
    ground = Image.fromarray(np.where((x + y) % 2, 235, 200).astype(np.uint8)).convert("RGBA")
    return Image.alpha_composite(ground, picture).convert("RGB")
