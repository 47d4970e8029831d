"""Scores a bundle on pictures that it was never trained on: see the sprites' ``judging`` for the videos,
``measures`` for what is measured.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster import __version__
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.scoring import judging
from conceptmaster.examples.sprites.scoring.gallery import worst
from conceptmaster.examples.sprites.scoring.judging import Generate, Result, Won, check_world, judged
from conceptmaster.examples.sprites.scoring.sheet import TITLES, Row
from conceptmaster.runtime.bundle_format.find import Bundle
from conceptmaster.runtime.bundle_format.schema import Manifest
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.tokenizer import Tokenizer

from ..world.atlas import Atlas, load, of_folder
from ..world.captions import tell
from ..world.drawing import PIXELS
from ..world.requesting import concepts, drawn_boxes, references, true_video
from ..world.scenes import FRAMES, MOTIONS, Scene
from .measures import ANYWHERE, IN_BOXES, MEASURES, RIVALS, Judge
from .options import Options

TRIES = 1 << 40
"""Distance between the seeds that are tried for one request."""
MOST_TRIES = 100


def check_bundle(manifest: Manifest) -> None:
    """Raises InputError for a bundle of another world."""
    check_world(manifest, "stickers", (FRAMES, PIXELS, PIXELS))


class Stickers:
    """The scenes of a score, and its pictures; see ``judging.World``."""

    def __init__(self, options: Options) -> None:
        self.options, self.atlas = options, _pictures(options.atlas, options.pictures)

    def scene(self, seed: int) -> Scene:
        """The scene of a seed, one whose words fit into the bundle where one is scored."""
        for tried in range(seed, seed + MOST_TRIES * TRIES, TRIES):
            scene = replace(self.options.scene(tried, self.atlas), seed=seed)
            if self.options.source != "model" or self._fits(scene):
                break
        return scene

    def _fits(self, scene: Scene) -> bool:
        tokenizer, manifest = _reader(self.options.bundle)
        try:
            caption = tell(scene, places=not self.options.boxes)
            tokenizer.encode(caption, manifest.prompt_tokens, "the caption")
            for actor in scene.actors:
                tokenizer.encode(actor.label, manifest.shapes.label_tokens, "a label")
        except InputError:
            return False
        return True

    def request(self, scene: Scene, turn: int | None) -> Request:
        """The scene's request; concept i gets picture i + ``turn``, None leaves the concepts out."""
        pictures, boxes = references(scene, self.atlas), {}
        if self.options.boxes and turn is not None:
            found = drawn_boxes(scene, self.atlas)
            boxes = {
                a.label: dict(enumerate(each.tolist())) for a, each in zip(scene.actors, found, strict=True)
            }
        return Request(
            tell(scene, places=not self.options.boxes),
            () if turn is None else concepts(scene, pictures[turn:] + pictures[:turn]),
            steps=self.options.steps,
            guidance=self.options.guidance,
            seed=scene.seed,
            boxes=boxes,
        )

    def true_video(self, scene: Scene) -> np.ndarray:
        """What a perfect model would make of it, uint8 [17,128,128,3]."""
        return true_video(scene, self.atlas)

    def judge(self, scene: Scene) -> Callable[[np.ndarray], Won]:
        """Who wins in a video of it."""
        return Judge(scene, self.atlas, self.options.places, self.options.boxes)


def score(
    options: Options, *, generate: Generate | None = None, keep: int = 0, progress: bool = False
) -> tuple[dict[str, Any], list[Result]]:
    """Judge every request; arguments as of ``judging.judged``.

    Returns: the report (see ``summary``, with the settings and versions) and the results in the order of the
    seeds.
    Raises: InputError, BundleError and what generating raises.
    """
    start = time.perf_counter()
    told: dict[str, Any] = {"bundle": None}
    if options.source == "model" and generate is None:
        told = judging.about(options, Stickers(options), check_bundle)
    results = judged(options, Stickers, generate, keep, progress)
    report = {
        "world": "stickers",
        "requests": len(results),
        "seeds": [options.seeds.start, options.seeds.stop],
        "split": None if options.pictures is not None else options.split,
        "concepts": options.concepts,
        "same_noun": options.same_noun,
        "made_up_labels": options.made_up_labels,
        "places": options.places,
        "boxes": options.boxes,
        "source": options.source,
        **told,
        **summary(results, options),
        "seconds": round(time.perf_counter() - start, 2),
        "seconds_per_video": judging.seconds_per_video(results),
        "machine": {"processor": platform.machine(), "device": options.device, "workers": options.workers},
        "versions": {"conceptmaster": __version__, "numpy": np.__version__},
    }
    return report, results


def rows(options: Options, results: list[Result]) -> list[Row]:
    """Scored requests with the videos that were kept, for a sheet."""
    world = Stickers(options)
    found = []
    for result in results:
        scene = world.scene(result.seed)
        videos = {TITLES[name]: frames for name, frames in result.videos.items()}
        caption = f"seed {scene.seed}: {tell(scene, places=not options.boxes)}"
        found.append(
            Row(caption, references(scene, world.atlas), {"truth": world.true_video(scene), **videos})
        )
    return found


def worst_rows(
    options: Options, results: list[Result], most: int, *, generate: Generate | None = None
) -> list[Row]:
    """Of those requests that lost most contests, worst first, made once more with both controls."""
    found = []
    for seed, lost in worst(Stickers(options).scene, results)[:most]:
        shown = replace(options, seeds=range(seed, seed + 1), controls=True, workers=1)
        (row,) = rows(shown, score(shown, generate=generate, keep=1)[1])
        found.append(replace(row, caption=f"{lost}\n{row.caption}"))
    return found


def asked(options: Options) -> tuple[str, ...]:
    """The measures of a score."""
    if options.boxes:
        return IN_BOXES
    return MEASURES if options.places else ANYWHERE


def summary(results: list[Result], options: Options) -> dict[str, Any]:
    """``judging.summary`` of the measures of a score."""
    rivals = {"pair_binding": options.concepts, "identity": RIVALS + 1, "motion": len(MOTIONS)}
    rivals |= {"visible": RIVALS + 1, "placed": 1}
    return judging.summary(results, {measure: rivals[measure] for measure in asked(options)})


@functools.cache
def _reader(bundle: str) -> tuple[Tokenizer, Manifest]:
    opened = Bundle.open(bundle)
    return Tokenizer(opened.tokenizer), opened.manifest


@functools.cache
def _pictures(atlas: Path, folder: Path | None) -> Atlas:
    return load(atlas) if folder is None else of_folder(folder)
