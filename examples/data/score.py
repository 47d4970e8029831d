"""Pairs of drawn videos against their truth: whether the noun is right, and the boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster.errors import InputError
from conceptmaster.untrusted import parse_json, read_plain

from .drawn import TRUTH
from .pairs import read_pairs
from .rectangles import iou

LEAST_IOU = 0.7
LARGEST = 2**28


def score(videos: Path, pairs: Path) -> dict[str, Any]:
    """How many of the kept pairs are right: of all concepts in their video the boxes fit that best (mean IoU
    over the frames that have boxes) whose noun it is, with a mean IoU of at least `LEAST_IOU`.

    Returns: videos and concepts that there are, pairs, right, share, wrong (which), and of the right nouns
    the mean and the least mean IoU. Raises InputError for a folder without truth, or without pairs."""
    path = videos / TRUTH
    try:
        lines = [parse_json(line) for line in read_plain(path, LARGEST).splitlines()]
    except OSError as error:
        raise InputError(f"cannot read the truth {str(path)!r}: {error.strerror}; `draw` writes it") from None
    except ValueError as error:
        raise InputError(f"the truth {str(path)!r} {error}") from None
    truth = {line["video"]: line["concepts"] for line in lines}
    right, wrong, ious = 0, [], []
    for clip in read_pairs(pairs):
        for pair in clip.pairs:
            fits = {
                each["label"]: np.mean(
                    [iou(box, each["boxes"][clip.frames[0] + number]) for number, box in pair.boxes.items()]
                )
                for each in truth.get(clip.video, ())
            }
            best = max(fits, key=lambda label: fits[label], default=None)
            if best == pair.label and fits[best] >= LEAST_IOU:
                right += 1
            else:
                told = {label: round(float(fit), 3) for label, fit in fits.items()}
                wrong.append({"clip": clip.name, "label": pair.label, "iou": told})
            if best == pair.label:
                ious.append(float(fits[best]))
    total = right + len(wrong)
    return {
        "videos": len(truth),
        "concepts": sum(map(len, truth.values())),
        "pairs": total,
        "right": right,
        "share": round(right / total, 4) if total else None,
        "mean_iou": round(float(np.mean(ious)), 4) if ious else None,
        "least_iou": round(min(ious), 4) if ious else None,
        "wrong": wrong,
    }


def line(found: dict[str, Any]) -> str:
    """What `score` found, for people, and as JSON in the last line."""
    share = "none" if found["share"] is None else f"{100 * found['share']:.1f} %"
    text = (
        f"{found['pairs']} pairs of {found['videos']} videos with {found['concepts']} concepts: "
        f"{found['right']} right ({share}); mean IoU {found['mean_iou']}, least {found['least_iou']}"
    )
    return f"{text}\n{json.dumps(found)}"
