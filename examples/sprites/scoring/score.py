"""Scores a bundle on scenes whose looks it was never trained on, with the two controls that make a score mean
something.

For every seed three videos are generated from the same noise: as asked; without concepts, where only chance
can be right; and with the pictures swapped (concept i gets the picture of concept i + 1) but judged as if
they were not, where following the pictures is wrong. What is measured is in ``measures``; the true videos,
and true videos of other requests, can be scored in the model's place to see that the measures can be trusted.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from conceptmaster import __version__
from conceptmaster.errors import InputError
from conceptmaster.runtime.bundle_format.find import Bundle
from conceptmaster.runtime.bundle_format.schema import Manifest
from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.progress import bar
from conceptmaster.runtime.request import MAX_SEED, Request
from conceptmaster.runtime.video import Video

from ..arguments import option, seed_range
from ..processes import in_processes
from ..world.draw import draw_clip
from ..world.requesting import concepts, references
from ..world.scenes import FRAMES, MAX_CONCEPTS, MOTIONS, NOUNS, SIZE, TEXTURES, Scene, random_scene
from .measures import MEASURES, RIVALS, Judge

SOURCES = ("model", "truth", "shuffled")
ASKED, NO_CONCEPTS, SWAPPED = "", "_no_concepts", "_swapped"
"""The videos of a request, named by what they add to a measure's name in the report."""

MOST_REQUESTS = 1_000_000

Generate = Callable[[Request], Video]
"""Makes the video of a request: a pipeline, or anything else that is to be judged."""


@dataclass(frozen=True)
class Options:
    """What to score and how; None means the bundle's default.

    source: "model" generates, "truth" takes the true videos, "shuffled" those of the next request; controls:
    whether the two controls are generated. Each of the workers has a pipeline of its own. Raises InputError
    for the first field that is wrong; the bundle's own limits show when it is opened.
    """

    seeds: range = option(range(64), "of scenes and noise, A to B - 1 (0:64)", type=seed_range, metavar="A:B")
    concepts: int = option(2, "concepts in a scene, 1 to 3", metavar="K")
    same_noun: bool = option(False, "two of them share their noun; else all differ")
    bundle: str = option("sprites", "shipped bundle or a path", metavar="NAME")
    source: str = "model"
    steps: int | None = option(None, "model evaluations (the bundle's default)", metavar="N")
    guidance: float | None = option(None, "(the bundle's default)", metavar="G")
    concept_guidance: float | None = option(None, "(the bundle's default)", metavar="C")
    solver: str | None = option(None, "euler or unipc (the bundle's default)", metavar="NAME")
    controls: bool = True
    device: str = option("cpu", "cpu or cuda", metavar="NAME")
    threads: int | None = option(None, "CPU threads (one per core; one with several workers)", metavar="N")
    workers: int = option(1, "processes, of one thread each", metavar="W")

    def __post_init__(self) -> None:
        first, end = self.seeds.start, self.seeds.stop
        if self.seeds.step != 1 or not 0 <= first < end <= MAX_SEED + 1:
            raise InputError(f"seeds must be A:B with 0 <= A < B <= 2**63, not {first}:{end}")
        if end - first > MOST_REQUESTS:
            raise InputError(f"{first}:{end} are {end - first} requests, more than {MOST_REQUESTS}")
        check_wishes(self.concepts, self.same_noun)
        if self.source not in SOURCES:
            raise InputError(f"the source must be one of {', '.join(SOURCES)}, not {self.source!r}")
        if self.source == "shuffled" and len(self.seeds) < 2:
            raise InputError("shuffling needs at least two requests")
        if self.workers < 1:
            raise InputError(f"workers must be 1 or more, not {self.workers}")
        Request(
            "checks",
            steps=self.steps,
            guidance=self.guidance,
            concept_guidance=self.concept_guidance,
            solver=self.solver,
        )

    def scene(self, seed: int) -> Scene:
        """The scene of a seed: held-out looks, told plainly."""
        return judged_scene(seed, self.concepts, self.same_noun)


@dataclass(frozen=True)
class Result:
    """One request, judged. won: video → measure → one entry per concept; seconds: of each video generated;
    videos: video → uint8 [F, H, W, 3], where asked for."""

    seed: int
    won: dict[str, dict[str, list[bool]]]
    seconds: list[float]
    videos: dict[str, np.ndarray]


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
    made = manifest.shapes.frames, manifest.shapes.height, manifest.shapes.width
    if not manifest.name.startswith("sprites") or made != (FRAMES, SIZE, SIZE):
        raise InputError(
            f"the bundle {manifest.name!r} is of another world: this world's bundles are named sprites… and "
            f"make {FRAMES} frames of {SIZE}×{SIZE}, this one makes {made[0]} of {made[2]}×{made[1]}"
        )


def score(
    options: Options, *, generate: Generate | None = None, keep: int = 0, progress: bool = False
) -> tuple[dict[str, Any], list[Result]]:
    """Judge every request.

    Args: generate: what is judged instead of the bundle, which is then not opened (one worker only); keep: of
    how many requests, from the first, the videos are kept; progress: show a bar on standard error.

    Returns: the report (see ``summary``, with the settings and versions) and the results in the order of the
    seeds.
    Raises: InputError, BundleError and what generating raises.
    """
    start = time.perf_counter()
    about: dict[str, Any] = {"bundle": None}
    if options.source == "model" and generate is None:
        about = _about(options)
    results = []
    with bar(len(options.seeds), "score", progress) as advance:
        for result in _judge_all(options, generate, keep):
            results.append(result)
            advance()
    seconds = [second for result in results for second in result.seconds]
    report = {
        "world": "sprites",
        "requests": len(results),
        "seeds": [options.seeds.start, options.seeds.stop],
        "concepts": options.concepts,
        "same_noun": options.same_noun,
        "source": options.source,
        **about,
        **summary(results, options.concepts),
        "texture_of": texture_of(options, results),
        "seconds": round(time.perf_counter() - start, 2),
        "seconds_per_video": _rounded(np.median(seconds)) if seconds else None,
        "machine": {"processor": platform.machine(), "device": options.device, "workers": options.workers},
        "versions": {"conceptmaster": __version__, "numpy": np.__version__},
    }
    return report, results


def summary(results: list[Result], count: int) -> dict[str, Any]:
    """Shares of contests won: ``measure`` + video (``pair_binding_swapped``) to 0..1, None without contests.

    Beside them ``standard_errors`` (over requests, since the concepts of one share a video) and ``chance``.
    """
    shares: dict[str, Any] = {}
    errors: dict[str, float | None] = {}
    for video in (ASKED, NO_CONCEPTS, SWAPPED):
        for measure in MEASURES:
            means = [
                float(np.mean(r.won[video][measure])) for r in results if r.won.get(video, {}).get(measure)
            ]
            shares[measure + video] = _rounded(np.mean(means)) if means else None
            errors[measure + video] = (
                _rounded(np.std(means, ddof=1) / len(means) ** 0.5) if means[1:] else None
            )
    rivals = {"pair_binding": count, "identity": RIVALS + 1, "noun": len(NOUNS)}
    rivals |= {"texture": len(TEXTURES), "motion": len(MOTIONS)}
    return shares | {
        "standard_errors": errors,
        "chance": {
            measure: _rounded(1 / number) if number > 1 else None for measure, number in rivals.items()
        },
    }


def texture_of(options: Options, results: list[Result]) -> dict[str, float | None]:
    """Share of right textures among the concepts asked with each kind, None for a kind that no one asked."""
    won: dict[str, list[bool]] = {kind: [] for kind in TEXTURES}
    for result in results:
        actors = options.scene(result.seed).actors
        for actor, right in zip(actors, result.won[ASKED]["texture"], strict=True):
            won[actor.identity.texture].append(right)
    return {kind: _rounded(np.mean(rights)) if rights else None for kind, rights in won.items()}


def _rounded(value: float | np.floating) -> float:
    return round(float(value), 4)


def _about(options: Options) -> dict[str, Any]:
    """The bundle and the settings it will be run with, checked against a first request."""
    manifest = Bundle.open(options.bundle).manifest
    check_bundle(manifest)
    asked, _ = _request(options, options.scene(options.seeds[0]), 0).resolve(manifest)
    names = ("solver", "steps", "shift", "guidance", "concept_guidance")
    settings = {name: getattr(asked, name) for name in names}
    return {
        "bundle": manifest.name,
        "precision": manifest.precision,
        "written_by": manifest.written_by,
        **settings,
    }


def _request(options: Options, scene: Scene, turn: int | None) -> Request:
    """The scene's request; concept i gets picture i + ``turn``, None leaves the concepts out."""
    pictures = references(scene)
    return Request(
        scene.caption,
        () if turn is None else concepts(scene, pictures[turn:] + pictures[:turn]),
        steps=options.steps,
        guidance=options.guidance,
        concept_guidance=options.concept_guidance,
        solver=options.solver,
        seed=scene.seed,
    )


def _videos(
    options: Options, generate: Generate | None, seed: int
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The videos to judge for a seed, and the seconds that generating each took."""
    if options.source == "truth":
        return {ASKED: draw_clip(options.scene(seed))[0]}, []
    if options.source == "shuffled":
        other = seed + 1 if seed + 1 in options.seeds else options.seeds[0]
        return {ASKED: draw_clip(options.scene(other))[0]}, []
    assert generate is not None
    turns: dict[str, int | None] = {ASKED: 0}
    if options.controls:
        turns[NO_CONCEPTS] = None
        if options.concepts > 1:
            turns[SWAPPED] = 1
    scene, seconds, videos = options.scene(seed), [], {}
    for name, turn in turns.items():
        start = time.perf_counter()
        videos[name] = generate(_request(options, scene, turn)).frames
        seconds.append(time.perf_counter() - start)
    return videos, seconds


def _judge(options: Options, generate: Generate | None, keep: int, seed: int) -> Result:
    videos, seconds = _videos(options, generate, seed)
    judge = Judge(options.scene(seed))
    won = {name: judge(video) for name, video in videos.items()}
    return Result(seed, won, seconds, videos if seed - options.seeds[0] < keep else {})


def _judge_all(options: Options, generate: Generate | None, keep: int) -> Iterator[Result]:
    if options.workers == 1 or generate is not None:
        generate = generate or _open(options)
        for seed in options.seeds:
            yield _judge(options, generate, keep, seed)
        return
    yield from in_processes(functools.partial(_work, options, keep), options.seeds, options.workers)


def _open(options: Options) -> Generate | None:
    """The bundle's pipeline as a function, None where nothing is generated."""
    if options.source != "model":
        return None
    threads = 1 if options.threads is None and options.workers > 1 else options.threads
    pipeline = Pipeline.from_bundle(options.bundle, device=options.device, threads=threads)
    return lambda request: pipeline.generate(request)[0]


_open_once = functools.cache(
    _open
)  # in a worker, so that what goes wrong is raised where a result is awaited


def _work(options: Options, keep: int, seed: int) -> Result:
    return _judge(options, _open_once(options), keep, seed)
