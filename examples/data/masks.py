"""Masks of boxes: made, and dropped where they are too large, too small or fragmented, or show something
else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

from .boxes import Agrees
from .moving import Moving, cut
from .rectangles import Box, area, crop, pixels
from .thresholds import Thresholds

Segment = Callable[[int, np.ndarray, Box], np.ndarray]
"""The mask bool [H,W] of what a box shows in the frame of a number, uint8 [H,W,3]."""
AROUND = 0.04
"""How far beyond its box what GrabCut may find reaches, in shares of the frame."""
PIECE = 0.01
"""Least share of a mask that counts as a piece of it."""
HOLE = 0.03
"""Greatest share of a mask that a hole of it has which GrabCut's colours are taken to have made."""
GREY = 128
"""What lies around a thing in the picture that CLIP sees of its mask."""


def grab_cut(moving: Moving) -> Segment:
    """Masks without weights: GrabCut, from what moves in the box, or from the box alone where nothing
    does."""
    places = {number: at for at, number in enumerate(moving.sampled.numbers)}

    def segment(number: int, frame: np.ndarray, box: Box) -> np.ndarray:
        small = moving.sampled.frames[places[number]]
        wide = (box[0] - AROUND, box[1] - AROUND, box[2] + AROUND, box[3] + AROUND)
        x0, y0, x1, y1 = pixels(tuple(min(1.0, max(0.0, side)) for side in wide), small.shape)  # type: ignore[arg-type]
        inside = np.zeros(small.shape[:2], bool)
        inside[y0:y1, x0:x1] = True
        evidence = np.where(inside, moving.evidence(places[number]), cv2.GC_BGD).astype(np.uint8)
        if ((evidence == cv2.GC_FGD) | (evidence == cv2.GC_PR_FGD)).sum() < 0.1 * inside.sum():
            a, b, c, d = pixels(box, small.shape)
            evidence = np.full(small.shape[:2], cv2.GC_BGD, np.uint8)
            evidence[b:d, a:c] = cv2.GC_PR_FGD
        mask = _whole(cut(small, evidence), pixels(box, small.shape)).astype(np.float32)
        size = (frame.shape[1], frame.shape[0])
        return np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR) > 0.5)

    return segment


def _whole(mask: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """A mask bool [H,W] without small holes, and without pieces that lie mostly outside of a box in
    pixels."""
    holes = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    small = np.flatnonzero(holes[2][:, cv2.CC_STAT_AREA] <= HOLE * mask.sum())
    mask = mask | np.isin(holes[1], small[small > 0])
    count, pieces = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    x0, y0, x1, y1 = box
    whole = np.bincount(pieces.ravel(), minlength=count)
    inside = np.bincount(pieces[y0:y1, x0:x1].ravel(), minlength=count)
    good = np.flatnonzero(2 * inside >= whole)
    return np.isin(pieces, good[good > 0])


def wrong(mask: np.ndarray, box: Box, thresholds: Thresholds) -> str | None:
    """By the paper's rules what is wrong with a mask bool [H,W], None for a good one."""
    share = float(mask.mean())
    if share < thresholds.least_mask * area(box):
        return "mask too small"
    if share > thresholds.most_mask:
        return "mask too large"
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    sizes = stats[1:count, cv2.CC_STAT_AREA] / max(1, mask.sum())
    if (sizes >= PIECE).sum() > thresholds.most_pieces or sizes.max() < thresholds.least_largest:
        return "mask fragmented"
    return None


def picture(frame: np.ndarray, mask: np.ndarray, box: Box) -> np.ndarray:
    """What CLIP sees of a mask: the box, grey around the thing, uint8 [h,w,3]."""
    return crop(np.where(mask[..., None], frame, GREY).astype(np.uint8), box)


def choose(
    concept: Mapping[str, Any],
    frames: Mapping[int, np.ndarray],
    segment: Segment,
    has_face: Callable[[np.ndarray], bool],
    agrees: Agrees | None,
    thresholds: Thresholds,
    count: int,
) -> tuple[dict[int, np.ndarray], int | None, str | None]:
    """The masks of a concept's good frames by number; the frame that shows it best; and, where too few are
    good, why.

    frames: uint8 [H,W,3] by number; count: of the frames that were to have boxes. The best frame shows the
    largest mask, rather one that does not touch the frame's edge, of persons one with a face.
    """
    masks: dict[int, np.ndarray] = {}
    reasons: Counter[str] = Counter()
    ranked: list[tuple[bool, int, int]] = []
    for number, box in ((int(number), tuple(box)) for number, box in concept["boxes"].items()):
        frame = frames[number]
        mask = segment(number, frame, box)
        reason = wrong(mask, box, thresholds)
        if reason is None and agrees is not None and not agrees(picture(frame, mask, box), concept["class"]):
            reason = "CLIP sees another class in the mask"
        if reason is not None:
            reasons[reason] += 1
            continue
        masks[number] = mask
        if concept["kind"] == "persons" and not has_face(crop(frame, box)):
            reasons["no face"] += 1
            continue
        edge = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
        ranked.append((not edge, int(mask.sum()), number))
    if len(masks) < max(1, thresholds.least_seen * count) or not ranked:
        return {}, None, reasons.most_common(1)[0][0] if reasons else "no box"
    return masks, max(ranked)[2], None
