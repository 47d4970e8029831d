"""The set of this world: scenes as MC-Bench's samples, and a finder that knows where each concept is told to
be."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from conceptmaster.atomic_write import replacing
from conceptmaster.benchmarks.mc_bench.regions import Found, boxed, masked
from conceptmaster.benchmarks.mc_bench.samples import Sample
from conceptmaster.runtime.sheet import save_png

from ..paper.judging import request_scene
from ..world.draw import draw_clip
from ..world.requesting import references
from ..world.scenes import SIZE, Scene

SHOWN = 0.5
"""Least opacity of a mask's pixel."""


def name_of(seed: int) -> str:
    """What the sample of a seed is called."""
    return f"sprites-{seed:04d}"


@functools.lru_cache(maxsize=256)
def scene_of(name: str) -> Scene:
    """The scene of a sample: two concepts of held-out looks, of one noun where the seed is odd."""
    return request_scene(int(name.rpartition("-")[2]))


def write_set(seeds: range, folder: Path) -> list[Sample]:
    """The samples, their pictures written to ``folder`` where they are missing. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for seed in seeds:
        name = name_of(seed)
        scene, paths = scene_of(name), []
        for number, picture in enumerate(references(scene), 1):
            paths.append(folder / f"{name}-{number}.png")
            if not paths[-1].exists():
                with replacing(paths[-1]) as temporary:
                    save_png(Image.fromarray(picture), temporary)
        labels = tuple(actor.label for actor in scene.actors)
        samples.append(Sample(name, scene.caption, labels, tuple(paths), seed))
    return samples


class ToldBoxes:
    """The box in which each concept is told to be, frame by frame."""

    version = 1

    def find(
        self, frames: np.ndarray, labels: Sequence[str], indices: Sequence[int], name: str
    ) -> list[Found]:
        """See MC-Bench's ``Finder``."""
        boxes = [SIZE * actor.boxes()[list(indices)] for actor in scene_of(name).actors]
        return [[boxed(box, SIZE, SIZE) for box in of] for of in boxes]


class ToldMasks:
    """The pixels that each concept has in the true video."""

    version = 2

    def find(
        self, frames: np.ndarray, labels: Sequence[str], indices: Sequence[int], name: str
    ) -> list[Found]:
        """See MC-Bench's ``Finder``."""
        shown = draw_clip(scene_of(name))[1][:, list(indices)] >= SHOWN
        return [[masked(mask) for mask in of] for of in shown]
