"""What the world's judge says of a row's videos, request by request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..scoring.measures import MEASURES, Judge
from ..scoring.score import judged_scene
from ..world.scenes import Scene

CONCEPTS = 2
"""In every request."""


def of_one_noun(seed: int) -> bool:
    """Whether both concepts of a request have one noun: those of every odd seed."""
    return seed % 2 == 1


def request_scene(seed: int) -> Scene:
    """The scene of a request: two concepts of held-out looks."""
    return judged_scene(seed, CONCEPTS, same_noun=of_one_noun(seed))


def judge(scenes: Sequence[Scene], videos: Iterable[np.ndarray]) -> dict[str, list[float]]:
    """Of each request: the share of its concepts that win each contest of ``measures.py``, 0..1, and the
    ``margin``, by how much a concept's own look fits better in its place than the other's, -1..1."""
    found: dict[str, list[float]] = {name: [] for name in (*MEASURES, "margin")}
    for scene, video in zip(scenes, videos, strict=True):
        judging = Judge(scene)
        for name, won in judging(video).items():
            found[name].append(float(np.mean(won)))
        found["margin"].append(float(np.mean(judging.margins(video))))
    return found
