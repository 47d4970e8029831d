"""Boxes of a shot's nouns on some of its frames: found, cleaned of doubles and odd sizes, and seen often
enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .moving import Moving
from .nouns import Noun
from .rectangles import Box, area, box_of, crop, iou
from .telling import assign, cost, told
from .thresholds import Thresholds

Detect = Callable[[np.ndarray, Sequence[str]], "list[Found]"]
"""Boxes of labels in a frame uint8 [H,W,3]."""
Agrees = Callable[[np.ndarray, str], bool]
"""Whether a picture uint8 [H,W,3] shows a class."""


@dataclass(frozen=True)
class Found:
    """A box, its score (0 to 1), and the label that it is of."""

    box: Box
    score: float
    label: str


def choose(count: int, thresholds: Thresholds, frames: int) -> list[int]:
    """Which of `count` sampled frames of a shot of `frames` get boxes: equally far apart."""
    wanted = min(count, max(thresholds.least_frames, round(thresholds.frames * frames)))
    return [int((n + 0.5) * count / wanted) for n in range(wanted)]


def suppress(found: Sequence[Found], most: float) -> list[Found]:
    """Non-maximum suppression: of boxes that overlap more than `most` the best alone, whatever their
    labels."""
    kept: list[Found] = []
    for each in sorted(found, key=lambda each: -each.score):
        if all(iou(each.box, other.box) <= most for other in kept):
            kept.append(each)
    return kept


def detected(
    frames: Mapping[int, np.ndarray], nouns: Sequence[Noun], detect: Detect
) -> dict[int, list[Found]]:
    """Boxes by frame, of a model that finds words in pictures."""
    labels = [noun.label for noun in nouns]
    return {number: detect(frame, labels) for number, frame in frames.items()}


def moving(
    evidence: Moving, chosen: Sequence[int], caption: str, nouns: Sequence[Noun], thresholds: Thresholds
) -> tuple[dict[int, list[Found]], dict[str, str]]:
    """Boxes by frame, of what moves, named by what the caption tells; and why nouns have none, by label."""
    seen = [t for t in evidence.things(list(chosen)) if len(t.masks) >= thresholds.least_seen * len(chosen)]
    size = np.array([evidence.width, evidence.height])
    costs = np.array(
        [
            [
                cost(told(caption, noun, list(nouns)), *(t.middle(f(t.masks)) / size for f in (min, max)))
                for t in seen
            ]
            for noun in nouns
        ]
    ).reshape(len(nouns), len(seen))
    which, why = assign(costs, thresholds.place_margin)
    found: dict[int, list[Found]] = {evidence.sampled.numbers[at]: [] for at in chosen}
    for n, t in which.items():
        for at, mask in seen[t].masks.items():
            found[evidence.sampled.numbers[at]].append(Found(box_of(mask), 1.0, nouns[n].label))
    return found, {nouns[n].label: reason for n, reason in why.items()}


def clean(
    found: Mapping[int, Sequence[Found]],
    frames: Mapping[int, np.ndarray],
    nouns: Sequence[Noun],
    thresholds: Thresholds,
    agrees: Agrees | None,
    why: Mapping[str, str],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The nouns that have a good box in enough frames, each with its boxes, and what was dropped, with why.

    frames: by number, uint8 [H,W,3]; agrees: CLIP, None to go without; why: nothing was found of some labels.
    """
    boxes: dict[str, dict[int, Box]] = {noun.label: {} for noun in nouns}
    reasons: dict[str, Counter[str]] = {noun.label: Counter() for noun in nouns}
    for number, some in found.items():
        kept = suppress(some, thresholds.nms)
        for noun in nouns:
            good = []
            for each in (each for each in kept if each.label == noun.label):
                reason = _wrong(each.box, frames[number], noun, thresholds, agrees)
                if reason is None:
                    good.append(each.box)
                else:
                    reasons[noun.label][reason] += 1
            if len(good) == 1:
                boxes[noun.label][number] = good[0]
            else:
                reasons[noun.label]["several boxes of it" if good else "no box"] += 1
    concepts, dropped = [], []
    for noun in nouns:
        own = boxes[noun.label]
        if len(own) >= max(1, thresholds.least_seen * len(found)):
            told = {str(number): [round(side, 5) for side in box] for number, box in own.items()}
            concepts.append({"label": noun.label, "class": noun.name, "kind": noun.kind, "boxes": told})
        else:
            counted = reasons[noun.label]
            if len(counted) > 1:
                del counted["no box"]  # the consequence of another
            reason = why.get(noun.label) or counted.most_common(1)[0][0]
            dropped.append({"label": noun.label, "why": reason, "value": len(own)})
    return concepts, dropped


def _wrong(
    box: Box, frame: np.ndarray, noun: Noun, thresholds: Thresholds, agrees: Agrees | None
) -> str | None:
    """What is wrong with a box, None for a good one."""
    if area(box) < thresholds.least_area:
        return "box below the least area"
    if area(box) > thresholds.most_area:
        return "box above the greatest area"
    if agrees is not None and not agrees(crop(frame, box), noun.name):
        return "CLIP sees another class in the box"
    return None
