"""The measures of one video, in parts that are computed, and kept, each on its own.

| measure | what it is |
| --- | --- |
| fidelity CLIP-T, CLIP-cap | 100 · cosine of frame and caption, mean over frames |
| fidelity CLIP-I | cosine of whole frame and each concept's picture |
| decoupling CLIP-T, CLIP-tag | 100 · cosine of each concept's region and its label |
| decoupling CLIP-I, CLIP-I | cosine of each concept's region and its picture, by CLIP |
| decoupling DINO-I, DINO-I | the same by DINOv2 |
| CLIP-tag_dis | 100 · cosine of each concept's region and the *other* concepts' labels: ours |

Names that begin with fidelity and decoupling are of the paper's version 1 (regions are boxes), the others of
version 2 (regions are masks). Where a concept is not found in a frame its cosine counts as 0 (ours: leaving
it out would reward models that draw only what they can); for CLIP-tag_dis, which is better
the lower it is and whose formula the paper does not give, that frame is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .embedders import Aesthetic, Looks, Names
from .flow import dynamic_degree, smoothness
from .naturalness import niqe
from .regions import Finder, Found
from .samples import Sample
from .videos import Clip

PERCENT = 100.0
Values = dict[str, float]


@dataclass(frozen=True)
class Measure:
    """How a measure is told: better: "higher", "lower", or "" where more is not better; note: how it
    differs."""

    better: str
    note: str = ""


MEASURES = {
    "fidelity CLIP-T": Measure("higher"),
    "fidelity CLIP-I": Measure("higher"),
    "decoupling CLIP-T": Measure("higher"),
    "decoupling CLIP-I": Measure("higher"),
    "decoupling DINO-I": Measure("higher"),
    "CLIP-cap": Measure("higher"),
    "CLIP-tag": Measure("higher"),
    "CLIP-I": Measure("higher"),
    "DINO-I": Measure("higher"),
    "CLIP-tag_dis": Measure("lower", "the paper has no formula: ours"),
    "motion smoothness": Measure("higher", "DIS flow in the middle, not AMT-S"),
    "dynamic degree": Measure("", "DIS, not RAFT: mean length of the fastest 5 %, pixels at 8 fps"),
    "moves": Measure("", "VBench's dynamic degree, the share of videos that move; DIS, not RAFT"),
    "aesthetic": Measure("higher"),
    "NIQE": Measure("lower", "in the place of MUSIQ, whose weights nobody ships"),
    "found": Measure("higher", "share of concepts and frames where the concept is found"),
}
"""All of them, in the order of a table. ``found`` is none of the paper's: it says how much the others rest
on."""


@dataclass(frozen=True)
class Watched:
    """A video, its sample, and which frames the learned measures see. pictures: uint8 [H,W,3] of each
    concept."""

    sample: Sample
    clip: Clip
    pictures: Sequence[np.ndarray]
    indices: tuple[int, ...]
    _seen: dict[int, np.ndarray] = field(default_factory=dict)

    @functools.cached_property
    def frames(self) -> np.ndarray:
        """Those frames, uint8 [n,H,W,3]."""
        return self.clip.frames[list(self.indices)]

    def embedded(self, looks: Looks) -> np.ndarray:
        """Those frames as somebody sees them, [n,D]; computed once."""
        if id(looks) not in self._seen:
            self._seen[id(looks)] = looks.pictures(list(self.frames))
        return self._seen[id(looks)]


class Part(Protocol):
    """Some measures that are computed together. name: of what is kept; about: what they depend on but the
    video and its request, as JSON has it."""

    name: str
    about: Any

    def measure(self, watched: Watched) -> Values:
        """By name; without those that have no meaning for this sample."""


class Motion:
    """How smoothly and how much it moves, of all frames."""

    name, about = "motion", 1

    def measure(self, watched: Watched) -> Values:
        """See ``Part``."""
        clip = watched.clip
        return {"motion smoothness": smoothness(clip.frames), **dynamic_degree(clip.frames, clip.fps)}


class Imaging:
    """How natural the frames are."""

    name = "imaging"

    def __init__(self, frames: int) -> None:
        self.about = {"frames": frames}

    def measure(self, watched: Watched) -> Values:
        """See ``Part``."""
        return {"NIQE": float(np.mean([niqe(frame) for frame in watched.frames]))}


class Caption:
    """Frames against the caption, and against the concepts' pictures."""

    name = "caption"

    def __init__(self, names: Callable[[], Names], about: Any) -> None:
        self.names, self.about = names, about

    def measure(self, watched: Watched) -> Values:
        """See ``Part``."""
        names = self.names()
        frames = watched.embedded(names)
        told = PERCENT * float((frames @ names.texts([watched.sample.caption])[0]).mean())
        values = {"fidelity CLIP-T": told, "CLIP-cap": told}
        if watched.pictures:
            values["fidelity CLIP-I"] = float((frames @ names.pictures(watched.pictures).T).mean())
        return values


class Beauty:
    """LAION's aesthetic score over 10."""

    name = "aesthetic"

    def __init__(self, judge: Callable[[], Aesthetic], about: Any) -> None:
        self.judge, self.about = judge, about

    def measure(self, watched: Watched) -> Values:
        """See ``Part``."""
        return {"aesthetic": float(self.judge().scores(list(watched.frames)).mean()) / 10}


class Concepts:
    """Each concept's region against its picture and the labels."""

    def __init__(
        self,
        finder: Callable[[], Finder],
        version: int,
        names: Callable[[], Names] | None,
        looks: Callable[[], Looks] | None,
        about: Any,
    ) -> None:
        self.finder, self.version, self.names, self.looks, self.about = finder, version, names, looks, about
        self.name = f"concepts-v{version}"

    def measure(self, watched: Watched) -> Values:
        """See ``Part``."""
        sample = watched.sample
        if not sample.labels:
            return {}
        found = self.finder().find(watched.frames, sample.labels, watched.indices, sample.name)
        values = {"found": float(np.mean([region is not None for of in found for region in of]))}
        crops = [_cut(watched.frames, of) for of in found]
        v1 = self.version == 1
        if self.names is not None:
            names = self.names()
            seen = [_embedded(names, of) for of in crops]
            own, others = to_labels(seen, names.texts(sample.labels))
            values["decoupling CLIP-T" if v1 else "CLIP-tag"] = PERCENT * own
            values["decoupling CLIP-I" if v1 else "CLIP-I"] = to_pictures(
                seen, names.pictures(watched.pictures)
            )
            if not v1 and others is not None:
                values["CLIP-tag_dis"] = PERCENT * others
        if self.looks is not None:
            looks = self.looks()
            seen = [_embedded(looks, of) for of in crops]
            own_looks = to_pictures(seen, looks.pictures(watched.pictures))
            values["decoupling DINO-I" if v1 else "DINO-I"] = own_looks
        return values


Seen = list[np.ndarray | None]
"""A concept in each frame, embedded [D]; None where it is not found."""


def to_pictures(seen: Sequence[Seen], pictures: np.ndarray) -> float:
    """Mean cosine of each concept's regions with its picture [N,D]; 0 where it is not found."""
    cosines = [
        0.0 if region is None else region @ own
        for of, own in zip(seen, pictures, strict=True)
        for region in of
    ]
    return float(np.mean(cosines))


def to_labels(seen: Sequence[Seen], labels: np.ndarray) -> tuple[float, float | None]:
    """Mean cosine of regions with their own labels [N,D], 0 where not found; and with the others' labels, of
    what is found: None where nothing is, or there is no other."""
    own = to_pictures(seen, labels)
    others = [
        float(region @ label)
        for number, of in enumerate(seen)
        for region in of
        if region is not None
        for other, label in enumerate(labels)
        if other != number
    ]
    return own, float(np.mean(others)) if others else None


def _cut(frames: np.ndarray, found: Found) -> list[np.ndarray | None]:
    return [
        None if region is None else region.cut(frame) for frame, region in zip(frames, found, strict=True)
    ]


def _embedded(looks: Looks, crops: Sequence[np.ndarray | None]) -> Seen:
    there = [crop for crop in crops if crop is not None]
    rows = iter(looks.pictures(there) if there else ())
    return [None if crop is None else next(rows) for crop in crops]


def evenly(frames: int, most: int) -> tuple[int, ...]:
    """Numbers of at most ``most`` frames spread over a video of so many, first and last among them; 0:
    all."""
    if not most or frames <= most:
        return tuple(range(frames))
    return tuple(int(i) for i in np.linspace(0, frames - 1, most).round())
