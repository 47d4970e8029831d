"""Scores a bundle on pictures that it was never trained on, with the two controls that make a score mean
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
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster import __version__
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.processes import in_processes
from conceptmaster.runtime.bundle_format.find import Bundle
from conceptmaster.runtime.bundle_format.schema import Manifest
from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.progress import bar
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.video import Video

from ..world.atlas import Atlas, load, of_folder
from ..world.captions import tell
from ..world.drawing import PIXELS
from ..world.requesting import concepts, references, true_video
from ..world.scenes import FRAMES, MOTIONS, Scene
from .measures import ANYWHERE, MEASURES, RIVALS, Judge
from .options import Options

ASKED, NO_CONCEPTS, SWAPPED = "", "_no_concepts", "_swapped"
"""The videos of a request, named by what they add to a measure's name in the report."""

Generate = Callable[[Request], Video]
"""Makes the video of a request: a pipeline, or anything else that is to be judged."""


@dataclass(frozen=True)
class Result:
    """One request, judged. won: video → measure → one entry per concept; seconds: of each video generated;
    videos: video → uint8 [F,H,W,3], where asked for."""

    seed: int
    won: dict[str, dict[str, list[bool]]]
    seconds: list[float]
    videos: dict[str, np.ndarray]


def check_bundle(manifest: Manifest) -> None:
    """Raises InputError for a bundle of another world."""
    made = manifest.shapes.frames, manifest.shapes.height, manifest.shapes.width
    if not manifest.name.startswith("stickers") or made != (FRAMES, PIXELS, PIXELS):
        raise InputError(
            f"the bundle {manifest.name!r} is of another world: this world's bundles are named stickers… and "
            f"make {FRAMES} frames of {PIXELS}×{PIXELS}, this one makes {made[0]} of {made[2]}×{made[1]}"
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
        "world": "stickers",
        "requests": len(results),
        "seeds": [options.seeds.start, options.seeds.stop],
        "split": None if options.pictures is not None else options.split,
        "concepts": options.concepts,
        "same_noun": options.same_noun,
        "made_up_labels": options.made_up_labels,
        "places": options.places,
        "source": options.source,
        **about,
        **summary(results, options),
        "seconds": round(time.perf_counter() - start, 2),
        "seconds_per_video": round(float(np.median(seconds)), 4) if seconds else None,
        "machine": {"processor": platform.machine(), "device": options.device, "workers": options.workers},
        "versions": {"conceptmaster": __version__, "numpy": np.__version__},
    }
    return report, results


def asked(options: Options) -> tuple[str, ...]:
    """The measures of a score."""
    return MEASURES if options.places else ANYWHERE


def summary(results: list[Result], options: Options) -> dict[str, Any]:
    """Shares of contests won: ``measure`` + video (``pair_binding_swapped``) to 0..1, None without contests.

    Beside them ``standard_errors`` (over requests, since the concepts of one share a video) and ``chance``.
    """
    shares: dict[str, Any] = {}
    errors: dict[str, float | None] = {}
    for video in (ASKED, NO_CONCEPTS, SWAPPED):
        for measure in asked(options):
            won = [r.won.get(video, {}).get(measure) for r in results]
            means = [float(np.mean(each)) for each in won if each]
            many = len(means) > 1
            shares[measure + video] = round(float(np.mean(means)), 4) if means else None
            errors[measure + video] = (
                round(float(np.std(means, ddof=1) / len(means) ** 0.5), 4) if many else None
            )
    rivals = {"pair_binding": options.concepts, "identity": RIVALS + 1, "motion": len(MOTIONS)}
    rivals |= {"visible": RIVALS + 1}
    chance = {name: round(1 / rivals[name], 4) if rivals[name] > 1 else None for name in asked(options)}
    return shares | {"standard_errors": errors, "chance": chance}


def _about(options: Options) -> dict[str, Any]:
    """The bundle and the settings it will be run with, checked against a first request."""
    manifest = Bundle.open(options.bundle).manifest
    check_bundle(manifest)
    atlas = _pictures(options.atlas, options.pictures)
    first, _ = _request(options, atlas, options.scene(options.seeds[0], atlas), 0).resolve(manifest)
    names = ("solver", "steps", "shift", "guidance", "concept_guidance")
    settings = {name: getattr(first, name) for name in names}
    return {"bundle": manifest.name, "precision": manifest.precision, **settings}


def _request(options: Options, atlas: Atlas, scene: Scene, turn: int | None) -> Request:
    """The scene's request; concept i gets picture i + ``turn``, None leaves the concepts out."""
    pictures = references(scene, atlas)
    return Request(
        tell(scene),
        () if turn is None else concepts(scene, pictures[turn:] + pictures[:turn]),
        steps=options.steps,
        guidance=options.guidance,
        seed=scene.seed,
    )


def _videos(
    options: Options, generate: Generate | None, seed: int, atlas: Atlas
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The videos to judge for a seed, and the seconds that generating each took."""
    if options.source == "truth":
        return {ASKED: true_video(options.scene(seed, atlas), atlas)}, []
    if options.source == "shuffled":
        other = seed + 1 if seed + 1 in options.seeds else options.seeds[0]
        return {ASKED: true_video(options.scene(other, atlas), atlas)}, []
    assert generate is not None
    turns: dict[str, int | None] = {ASKED: 0}
    if options.controls:
        turns[NO_CONCEPTS] = None
        if options.concepts > 1:
            turns[SWAPPED] = 1
    scene, seconds, videos = options.scene(seed, atlas), [], {}
    for name, turn in turns.items():
        start = time.perf_counter()
        videos[name] = generate(_request(options, atlas, scene, turn)).frames
        seconds.append(time.perf_counter() - start)
    return videos, seconds


def _judge(options: Options, generate: Generate | None, keep: int, seed: int) -> Result:
    atlas = _pictures(options.atlas, options.pictures)
    videos, seconds = _videos(options, generate, seed, atlas)
    judge = Judge(options.scene(seed, atlas), atlas, options.places)
    won = {name: judge(video) for name, video in videos.items()}
    return Result(seed, won, seconds, videos if seed - options.seeds[0] < keep else {})


def _judge_all(options: Options, generate: Generate | None, keep: int) -> Iterator[Result]:
    if options.workers == 1 or generate is not None:
        generate = generate or _open(options)
        for seed in options.seeds:
            yield _judge(options, generate, keep, seed)
        return
    yield from in_processes(functools.partial(_work, options, keep), options.seeds, options.workers)


@functools.cache
def _pictures(atlas: Path, folder: Path | None) -> Atlas:
    return load(atlas) if folder is None else of_folder(folder)


def _open(options: Options) -> Generate | None:
    """The bundle's pipeline as a function, None where nothing is generated."""
    if options.source != "model":
        return None
    threads = 1 if options.threads is None and options.workers > 1 else options.threads
    pipeline = Pipeline.from_bundle(options.bundle, device=options.device, threads=threads)
    return lambda request: pipeline.generate(request)[0]


_open_once = functools.cache(_open)  # in a worker, so that what goes wrong is raised where it is awaited


def _work(options: Options, keep: int, seed: int) -> Result:
    return _judge(options, _open_once(options), keep, seed)
