"""What is logged, of the server and of its workers: nothing of prompts, labels and pictures, unless asked."""

from __future__ import annotations

import logging

from . import frame_conditioning, picture_colors, pictures, sheet

TELLING = (frame_conditioning, picture_colors, pictures, sheet)
"""Their warnings name what a picture shows."""


def keep_quiet() -> None:
    """Before the first request."""
    for module in TELLING:
        logging.getLogger(module.__name__).setLevel(logging.ERROR)
