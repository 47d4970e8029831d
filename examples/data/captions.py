"""A video's caption: what lies beside it, NAME.txt or NAME.json, or what a captioning model says of its
frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster.untrusted import parse_json, read_plain

LONGEST = 4000
"""Bytes of a caption."""
FRAMES = 8
"""Of a shot, that a captioning model sees."""
Captioner = Callable[[list[np.ndarray]], str]
"""The caption of frames uint8 [H,W,3]."""


def beside(video: Path) -> tuple[str | None, str | None]:
    """The caption beside a video, or why what lies there is none; (None, None) where nothing does.

    A .json is text, or an object with the key "caption".
    """
    for suffix in (".txt", ".json"):
        path = video.with_suffix(suffix)
        try:
            data = read_plain(path, LONGEST)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return None, f"{path.name} cannot be read: {error}"
        try:
            value: Any = data.decode("utf-8-sig") if suffix == ".txt" else parse_json(data)
        except ValueError as error:
            return None, f"{path.name} {error}"
        value = value.get("caption") if isinstance(value, dict) else value
        if not isinstance(value, str) or not value.strip():
            return None, f"{path.name} holds no caption"
        return " ".join(value.split()), None
    return None, None
