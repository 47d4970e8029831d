"""Contact sheets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def draw(
    frames: np.ndarray,
    caption: str,
    references: Sequence[tuple[str, np.ndarray]],
    columns: int,
    scale: int | None,
) -> Image.Image:
    """A contact sheet: labelled reference pictures, the caption, then the frames in reading order.

    Args: frames: uint8 [F,H,W,3]; references: (label, uint8 [s,s,3]), all of one size; columns: frames in a
        row; scale: times each frame is enlarged, None for frames about 160 pixels wide (large ones are
        reduced).
    Returns: an RGB image.
    """
    height, width = frames.shape[1:3]
    factor = (
        float(scale) if scale is not None else max(1, round(160 / width)) if width <= 320 else 320 / width
    )
    cell = (max(1, round(width * factor)), max(1, round(height * factor)))
    resampling = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    gap, font = 8, ImageFont.load_default(size=14)
    columns = min(columns, len(frames))
    total = max(columns * (cell[0] + gap) + gap, 320)
    lines = _wrap(caption, total - 2 * gap, font)
    labels = 28 if references else 0
    side = len(references[0][1]) if references else 0
    if references:
        total = max(total, len(references) * (side + 2 * gap) + gap)
    rows = math.ceil(len(frames) / columns)
    image = Image.new(
        "RGB", (total, gap + side + labels + 20 * len(lines) + gap + rows * (cell[1] + gap)), "white"
    )
    draw = ImageDraw.Draw(image)
    for i, (label, picture) in enumerate(references):
        x = gap + i * (side + 2 * gap)
        image.paste(Image.fromarray(picture), (x, gap))
        draw.text((x, gap + side + 2), _shorten(label, side + gap, font), "black", font)
    y = gap + side + labels
    for line in lines:
        draw.text((gap, y), line, "black", font)
        y += 20
    y += gap
    for i, frame in enumerate(frames):
        place = (gap + i % columns * (cell[0] + gap), y + i // columns * (cell[1] + gap))
        image.paste(Image.fromarray(frame).resize(cell, resampling), place)
    return image


def _wrap(text: str, width: float, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Breaks text at spaces into lines at most `width` pixels long."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _shorten(text: str, width: float, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG. Raises OSError."""
    image.save(path, format="PNG")
