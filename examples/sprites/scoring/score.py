"""Scores a bundle on scenes whose looks it was never trained on: see ``judging`` for the videos, ``measures``
for what is measured.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from conceptmaster import __version__
from conceptmaster.errors import InputError
from conceptmaster.runtime.bundle_format.schema import Manifest
from conceptmaster.runtime.request import Request

from ..arguments import option
from ..world.draw import draw_clip
from ..world.requesting import concepts, references
from ..world.scenes import FRAMES, MAX_CONCEPTS, MOTIONS, NOUNS, SIZE, TEXTURES, Scene, random_scene
from . import judging
from .judging import ASKED, Generate, Result, Won, check_world, judged, rounded
from .measures import RIVALS, Judge


@dataclass(frozen=True)
class Options(judging.Settings):
    """What to score and how, see ``judging.Settings``. Raises InputError for the first wrong field."""

    concepts: int = option(2, f"concepts in a scene, 1 to {MAX_CONCEPTS}", metavar="K")
    concept_guidance: float | None = option(None, "(the bundle's default)", metavar="C")
    solver: str | None = option(None, "euler or unipc (the bundle's default)", metavar="NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_wishes(self.concepts, self.same_noun)
        Request("checks", concept_guidance=self.concept_guidance, solver=self.solver)

    def scene(self, seed: int) -> Scene:
        """The scene of a seed: held-out looks, told plainly."""
        return judged_scene(seed, self.concepts, self.same_noun)


def check_wishes(concepts: int, same_noun: bool) -> None:
    """Raises InputError for a number of concepts, or twins, that this world has not."""
    if not 1 <= concepts <= MAX_CONCEPTS:
        raise InputError(f"a scene of this world has 1 to {MAX_CONCEPTS} concepts, not {concepts}")
    if same_noun and concepts < 2:
        raise InputError("two concepts of the same noun need at least 2 concepts")


def judged_scene(seed: int, concepts: int, same_noun: bool, held_out: bool = True) -> Scene:
    """The scene that a seed is scored on. Raises ValueError for impossible wishes."""
    return random_scene(seed, held_out=held_out, concepts=concepts, same_noun=same_noun, plainly=True)


def check_bundle(manifest: Manifest) -> None:
    """Raises InputError for a bundle of another world."""
    check_world(manifest, "sprites", (FRAMES, SIZE, SIZE))


@dataclass(frozen=True)
class Sprites:
    """The scenes of a score; see ``judging.World``."""

    options: Options

    def scene(self, seed: int) -> Scene:
        """The scene of a seed."""
        return self.options.scene(seed)

    def request(self, scene: Scene, turn: int | None) -> Request:
        """The scene's request; concept i gets picture i + ``turn``, None leaves the concepts out."""
        options, pictures = self.options, references(scene)
        return Request(
            scene.caption,
            () if turn is None else concepts(scene, pictures[turn:] + pictures[:turn]),
            steps=options.steps,
            guidance=options.guidance,
            concept_guidance=options.concept_guidance,
            solver=options.solver,
            seed=scene.seed,
        )

    def true_video(self, scene: Scene) -> np.ndarray:
        """What a perfect model would make of it, uint8 [17,64,64,3]."""
        return draw_clip(scene)[0]

    def judge(self, scene: Scene) -> Callable[[np.ndarray], Won]:
        """Who wins in a video of it."""
        return Judge(scene)


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
        told = judging.about(options, Sprites(options), check_bundle)
    results = judged(options, Sprites, generate, keep, progress)
    report = {
        "world": "sprites",
        "requests": len(results),
        "seeds": [options.seeds.start, options.seeds.stop],
        "concepts": options.concepts,
        "same_noun": options.same_noun,
        "source": options.source,
        **told,
        **summary(results, options.concepts),
        "texture_of": texture_of(options, results),
        "seconds": round(time.perf_counter() - start, 2),
        "seconds_per_video": judging.seconds_per_video(results),
        "machine": {"processor": platform.machine(), "device": options.device, "workers": options.workers},
        "versions": {"conceptmaster": __version__, "numpy": np.__version__},
    }
    return report, results


def summary(results: list[Result], count: int) -> dict[str, Any]:
    """``judging.summary`` of this world's measures, for scenes of ``count`` concepts."""
    rivals = {"pair_binding": count, "identity": RIVALS + 1, "noun": len(NOUNS)}
    return judging.summary(results, rivals | {"texture": len(TEXTURES), "motion": len(MOTIONS)})


def texture_of(options: Options, results: list[Result]) -> dict[str, float | None]:
    """Share of right textures among the concepts asked with each kind, None for a kind that no one asked."""
    won: dict[str, list[bool]] = {kind: [] for kind in TEXTURES}
    for result in results:
        actors = options.scene(result.seed).actors
        for actor, right in zip(actors, result.won[ASKED]["texture"], strict=True):
            won[actor.identity.texture].append(right)
    return {kind: rounded(np.mean(rights)) if rights else None for kind, rights in won.items()}
