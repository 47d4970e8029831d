"""Every number by which the pipeline keeps or drops, with whose it is: the paper's (arXiv 2501.04698) or
ours.

The paper names the steps and few numbers; what it leaves open is ours.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.arguments import option

CUTS = ("drop", "split")


@dataclass(frozen=True)
class Between:
    """Reads a number of `low` to `high` for argparse, and checks one that is there."""

    kind: type
    low: float
    high: float

    def __call__(self, text: str) -> Any:
        """Raises ValueError for what is no number."""
        return self.kind(text)

    def __repr__(self) -> str:
        return self.kind.__name__  # argparse names it: invalid float value

    def check(self, name: str, value: float) -> None:
        """Raises InputError for a number out of range."""
        if not self.low <= value <= self.high:  # so NaN is refused as well
            told = f"at least {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"
            raise InputError(f"--{name.replace('_', '-')} must be {told}, not {value:g}")


def _number(default: float, low: float, high: float, whose: str, help: str) -> Any:
    """A threshold of `low` to `high`; whose: "paper", or "ours" where the paper does not say it."""
    return option(default, f"{help}; {whose} ({default})", type=Between(type(default), low, high))


@dataclass(frozen=True)
class Thresholds:
    """What is kept. Areas and boxes are in shares of the frame, times in seconds.

    Raises: InputError for the first that is out of range.
    """

    # cuts
    cuts: str = option(
        "drop", "a video with cuts: drop it (the paper's word), or split it (ours) (drop)", choices=CUTS
    )
    cut_threshold: float = _number(
        27.0, 0, 255, "ours, PySceneDetect's default", "content change of a cut in HSV, 0 to 255"
    )
    shortest: float = _number(0.5, 0, math.inf, "ours", "least seconds of a shot")
    longest: float = _number(
        10.0, 0.1, math.inf, "ours", "most seconds of a shot, the rest of it is left out"
    )
    # motion and light: "low optical flow" and "low light contrast" in the paper, without numbers
    least_flow: float = _number(
        2.0, 0, math.inf, "ours", "least optical flow: the top 5 %% of it, percent of the diagonal per second"
    )
    least_contrast: float = _number(
        0.08, 0, 1, "ours", "least contrast of the light: standard deviation of the luma, which is 0 to 1"
    )
    # boxes
    frames: float = _number(0.1, 1e-6, 1, "paper", "share of the frames that get boxes")
    least_frames: int = _number(4, 1, 1000, "ours", "but at least so many of a shot")
    box_score: float = _number(
        0.35, 0, 1, "ours, Grounding-DINO's own example", "least score of a box of Grounding-DINO"
    )
    nms: float = _number(0.5, 0, 1, "ours", "boxes that overlap (IoU) more than this are one")
    least_area: float = _number(0.1, 0, 1, "paper", "least area of a box")
    most_area: float = _number(0.9, 0, 1, "paper", "greatest area of a box")
    least_seen: float = _number(
        0.5, 0, 1, "ours", "least share of the frames with boxes in which a concept has one"
    )
    clip_rank: int = _number(
        1, 1, 120, "paper: the class must agree; ours: among so many", "best classes of CLIP"
    )
    # boxes without weights
    least_motion: float = _number(
        0.15, 0, math.inf, "ours", "least motion of what moves, percent of the diagonal between two frames"
    )
    place_margin: float = _number(
        0.2, 0, 2, "ours", "by how much told place and motion must fit better than in any other assignment"
    )
    # masks: "too large, too small or fragmented" in the paper, without numbers
    least_mask: float = _number(0.2, 0, 1, "ours", "too small: least share of its box that a mask covers")
    most_mask: float = _number(0.8, 0, 1, "ours", "too large: greatest share of the frame")
    most_pieces: int = _number(8, 1, 10000, "ours", "most pieces of a mask above 1 %% of it")
    least_largest: float = _number(0.8, 0, 1, "ours", "least share of a mask that its largest piece has")
    face_side: float = _number(
        0.1, 0, 1, "ours", "least side of a face that persons need, of their box's shorter one"
    )

    def __post_init__(self) -> None:
        if self.cuts not in CUTS:
            raise InputError(f"--cuts must be {' or '.join(CUTS)}, not {self.cuts!r:.40}")
        for field in dataclasses.fields(self):
            if isinstance(limits := field.metadata.get("type"), Between):
                limits.check(field.name, getattr(self, field.name))
        for low, high in (
            ("least_area", "most_area"),
            ("shortest", "longest"),
        ):
            if getattr(self, low) >= getattr(self, high):
                names = [f"--{name.replace('_', '-')}" for name in (low, high)]
                raise InputError(f"{names[0]} must be less than {names[1]}")
