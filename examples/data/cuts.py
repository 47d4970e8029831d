"""Where a video is cut, by PySceneDetect's ContentDetector, and which of its shots go on."""

from __future__ import annotations

from typing import Any

import cv2

from .films import Film
from .thresholds import Thresholds

SIDE = 320
"""Longer side of the frames that are compared."""
Dropped = list[dict[str, Any]]


def find_shots(film: Film, thresholds: Thresholds) -> tuple[list[dict[str, Any]], Dropped]:
    """The shots of a video, each {"shot": number, "frames": [first, behind the last]}, and what was dropped.

    Raises: films.Unreadable.
    """
    from scenedetect import ContentDetector, FrameTimecode

    shortest = max(1, round(thresholds.shortest * film.fps))
    # its own least length would swallow cuts: what is too short is told below
    detector = ContentDetector(threshold=thresholds.cut_threshold, min_scene_len=1)
    cuts: list[int] = []
    last = -1
    for number, frame in film.frames(0, side=SIDE):
        last = number
        found = detector.process_frame(
            FrameTimecode(number, film.fps), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        )
        cuts += [cut.frame_num for cut in found]
    if cuts and thresholds.cuts == "drop":
        return [], [{"why": "has cuts", "value": len(cuts)}]
    ends = [0, *cuts, last + 1]
    shots, dropped = [], []
    for shot, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
        if stop - start < shortest:
            dropped.append({"shot": shot, "why": "too short", "value": round((stop - start) / film.fps, 3)})
        else:
            last = min(stop, start + max(shortest, round(thresholds.longest * film.fps)))
            shots.append({"shot": shot, "frames": [start, last]})
    return shots, dropped
