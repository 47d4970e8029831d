"""Whether the scorer may judge: it must separate true from swapped videos, and agree with the exact judge.

What must be reached was set before the scorer was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conceptmaster.benchmarks.mc_bench.measures import Seen, evenly

from ..paper.judging import request_scene
from ..world.draw import draw_clip
from ..world.requesting import references
from ..world.scenes import NOUNS
from .scorer import Looks, Names, Scorer
from .told import ToldBoxes, name_of

SEEDS = range(5000, 5064)
"""Of the true videos, which no table is of."""
FRAMES = 6
SEPARATES, NAMED, AGREES = 0.9, 0.9, 0.6
"""Least shares of concepts that are nearer to their own picture than to the other, and of the right noun;
least rank correlation with the exact judge's margins."""


@dataclass(frozen=True)
class Admission:
    """What was found. pairs: concepts whose regions in true videos are nearer to their own picture than to
    the other's; twins: those of one noun alone; named: whose label is the nearest of all nouns; captions:
    frames nearer to their caption than to another's; agreement: Spearman's correlation with the judge, over
    videos; within: the same among those as asked alone, which is told and not asked for."""

    pairs: float
    twins: float
    named: float
    captions: float
    agreement: float
    within: float
    videos: int

    @property
    def reasons(self) -> list[str]:
        """Why not; empty if admitted."""
        limits = {
            "pairs": SEPARATES,
            "twins": SEPARATES,
            "named": NAMED,
            "captions": NAMED,
            "agreement": AGREES,
        }
        return [
            f"{name} {getattr(self, name):.3f}, must be {limit}"
            for name, limit in limits.items()
            if not getattr(self, name) >= limit
        ]


def separation(scorer: Scorer, seeds: range = SEEDS) -> dict[str, float]:
    """pairs, twins, named and captions, of true videos."""
    looks, names, finder = Looks(scorer), Names(scorer), ToldBoxes()
    won: dict[str, list[bool]] = {"pairs": [], "twins": [], "named": [], "captions": []}
    nouns = names.texts(NOUNS)
    frames_seen, captions = [], []
    for seed in seeds:
        scene = request_scene(seed)
        video = draw_clip(scene)[0]
        indices = evenly(len(video), FRAMES)
        frames = video[list(indices)]
        found = finder.find(frames, [], indices, name_of(seed))
        pictures = looks.pictures(references(scene))
        twins = len({actor.noun for actor in scene.actors}) == 1
        for number, (of, actor) in enumerate(zip(found, scene.actors, strict=True)):
            crops = [
                region.cut(frame) for region, frame in zip(of, frames, strict=True) if region is not None
            ]
            near = looks.pictures(crops).mean(0) @ pictures.T
            right = int(near.argmax()) == number
            won["pairs"].append(right)
            if twins:
                won["twins"].append(right)
            called = names.pictures(crops).mean(0) @ nouns.T
            won["named"].append(NOUNS[int(called.argmax())] == actor.noun)
        frames_seen.append(names.pictures(list(frames)).mean(0))
        captions.append(scene.caption)
    fits = np.stack(frames_seen) @ names.texts(captions).T
    others = ~np.eye(len(fits), dtype=bool)
    won["captions"] = (np.diag(fits)[:, None] > fits)[others].tolist()
    return {name: float(np.mean(values)) for name, values in won.items()}


def margin(seen: Sequence[Seen], pictures: np.ndarray) -> float:
    """By how much regions are nearer to their own picture than to the others': what the judge's margins are
    of."""
    found = []
    for number, of in enumerate(seen):
        others = np.delete(pictures, number, 0)
        found += [float(r @ pictures[number] - (others @ r).mean()) for r in of if r is not None]
    return float(np.mean(found)) if found else 0.0


def admit(
    scorer: Scorer, margins: Mapping[str, Sequence[float]], judged: Mapping[str, Sequence[float]], asked: str
) -> Admission:
    """The scorer, given its margins and the judge's of the same videos, by row of the table; asked: the row
    of the model as it ships."""
    mine = np.concatenate([np.asarray(margins[row]) for row in margins])
    theirs = np.concatenate([np.asarray(judged[row]) for row in margins])
    within = correlation(np.asarray(margins[asked]), np.asarray(judged[asked]))
    return Admission(
        **separation(scorer), agreement=correlation(mine, theirs), within=within, videos=len(mine)
    )


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, -1..1."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def told(admission: Admission) -> dict[str, Any]:
    """As a report has it."""
    return {name: round(value, 4) for name, value in vars(admission).items()} | {
        "must": {
            "pairs": SEPARATES,
            "twins": SEPARATES,
            "named": NAMED,
            "captions": NAMED,
            "agreement": AGREES,
        }
    }
