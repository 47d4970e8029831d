"""Contact sheets."""

from __future__ import annotations

import bisect
import functools
import logging
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

log = logging.getLogger(__name__)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


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
    Warns: a log line for letters that the font does not have: Pillow's own has little more than ASCII.
    """
    height, width = frames.shape[1:3]
    factor = (
        float(scale) if scale is not None else max(1, round(160 / width)) if width <= 320 else 320 / width
    )
    cell = (max(1, round(width * factor)), max(1, round(height * factor)))
    resampling = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    gap, font = 8, ImageFont.load_default(size=14)
    replaced: dict[str, str] = {}
    caption = _shown(caption, font, replaced)
    references = [(_shown(label, font, replaced), picture) for label, picture in references]
    if replaced:
        named = [(a if a.isprintable() else ascii(a), b) for a, b in replaced.items()]
        others = ", ".join(f"{letter} as {other}" for letter, other in named[:20])
        log.warning("the sheet's font does not have all letters: it shows %s", others)
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


def _shown(text: str, font: Font, replaced: dict[str, str]) -> str:
    """Text in one line, of letters that the font has. To `replaced` is added what stands for the others: the
    letter without its accents, or a question mark."""
    shown = []
    for letter in unicodedata.normalize("NFC", " ".join(text.split())):
        if unicodedata.category(letter) in ("Cc", "Cf", "Mn", "Me"):  # takes no room of its own
            continue
        if not _has(letter, font):
            plain = unicodedata.normalize("NFKD", "-" if unicodedata.category(letter) == "Pd" else letter)[0]
            replaced[letter] = plain if _has(plain, font) else "?"
        shown.append(replaced.get(letter, letter))
    return "".join(shown)


@functools.cache
def _has(letter: str, font: Font) -> bool:
    """Whether a font can draw a letter: it does not look like one that no font has."""
    if unicodedata.category(letter) == "Cs":  # half a letter
        return False
    return letter == " " or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Breaks text into lines at most `width` pixels long: at spaces, and words that are longer anywhere."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while len(begin := _begin(word, width, font)) < len(word):
            lines.append(begin)
            word = word[len(begin) :]
        lines.append(word)
    return lines


def _begin(text: str, width: float, font: Font) -> str:
    """As much of a text as `width` pixels hold, at least a letter."""
    most = min(len(text), int(width))  # a letter is a pixel wide at least
    fits = bisect.bisect_right(range(1, most + 1), width, key=lambda length: font.getlength(text[:length]))
    return text[: max(1, fits)]


def _shorten(text: str, width: float, font: Font) -> str:
    if (begin := _begin(text, width, font)) == text:
        return text
    return f"{_begin(begin, width - font.getlength('…'), font)}…"


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG. Raises OSError."""
    image.save(path, format="PNG")
