"""What the scores of all worlds have in common: the videos of a request, the two controls that make a score
mean something, and shares of contests won.

For every seed three videos are generated from the same noise: as asked; without concepts, where only chance
can be right; and with the pictures swapped (concept i gets the picture of concept i + 1) but judged as if
they were not, where following the pictures is wrong. The true videos, and true videos of other requests, can
be scored in the model's place to see that the measures can be trusted. Of requests that have boxes there is a
third control, without them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from conceptmaster.errors import InputError
from conceptmaster.runtime.bundle_format.find import Bundle
from conceptmaster.runtime.bundle_format.schema import Manifest
from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.progress import bar
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.video import Video

from ..arguments import check_seeds, option, seed_range
from ..processes import in_processes

SOURCES = ("model", "truth", "shuffled")
"""What is scored: what a bundle generates, the true videos, those of the next request."""
ASKED, NO_CONCEPTS, SWAPPED, NO_BOXES = "", "_no_concepts", "_swapped", "_no_boxes"
"""The videos of a request, named by what they add to a measure's name in the report."""

Generate = Callable[[Request], Video]
"""Makes the video of a request: a pipeline, or anything else that is to be judged."""
Won = dict[str, list[bool]]
"""By measure, one entry per concept."""


@dataclass(frozen=True)
class Settings:
    """What to score and how, whatever the world; None means the bundle's default.

    seeds: of the scenes and of the noise. same_noun: the first two concepts share their noun, otherwise all
    differ. source: of ``SOURCES``. controls: whether the two controls are generated. workers: processes, each
    with a pipeline of its own; threads: CPU threads of each pipeline. Raises InputError for the first field
    that is wrong; the bundle's own limits show when it is opened.
    """

    seeds: range = option(range(64), "of scenes and noise, A to B - 1 (0:64)", type=seed_range, metavar="A:B")
    concepts: int = option(2, "concepts in a scene", metavar="K")
    same_noun: bool = option(False, "two of them share their noun; else all differ")
    bundle: str = option("sprites", "shipped bundle or a path", metavar="NAME")
    source: str = "model"
    steps: int | None = option(None, "model evaluations (the bundle's default)", metavar="N")
    guidance: float | None = option(None, "(the bundle's default)", metavar="G")
    controls: bool = True
    device: str = option("cpu", "cpu or cuda", metavar="NAME")
    threads: int | None = option(None, "CPU threads (one per core; one with several workers)", metavar="N")
    workers: int = option(1, "processes, of one thread each", metavar="W")

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        if self.source not in SOURCES:
            raise InputError(f"the source must be one of {', '.join(SOURCES)}, not {self.source!r}")
        if self.source == "shuffled" and len(self.seeds) < 2:
            raise InputError("shuffling needs at least two requests")
        if self.workers < 1:
            raise InputError(f"workers must be 1 or more, not {self.workers}")
        Request("checks", steps=self.steps, guidance=self.guidance)


class World(Protocol):
    """The scenes that are scored on, of one score's options."""

    def scene(self, seed: int) -> Any:
        """The scene of a seed."""

    def request(self, scene: Any, turn: int | None) -> Request:
        """The scene's request; concept i gets picture i + ``turn``, None leaves the concepts out."""

    def true_video(self, scene: Any) -> np.ndarray:
        """What a perfect model would make of it, uint8 [F,H,W,3]."""

    def judge(self, scene: Any) -> Callable[[np.ndarray], Won]:
        """Who wins in a video of it."""


@dataclass(frozen=True)
class Result:
    """One request, judged. won: video → measure → one entry per concept; seconds: of each video generated;
    videos: video → uint8 [F,H,W,3], where asked for."""

    seed: int
    won: dict[str, Won]
    seconds: list[float]
    videos: dict[str, np.ndarray]


def check_world(manifest: Manifest, name: str, made: tuple[int, int, int]) -> None:
    """Raises InputError for a bundle of another world; made: frames, height and width of this world's."""
    found = manifest.shapes.frames, manifest.shapes.height, manifest.shapes.width
    if not manifest.name.startswith(name) or found != made:
        raise InputError(
            f"the bundle {manifest.name!r} is of another world: this world's bundles are named {name}… and "
            f"make {made[0]} frames of {made[2]}×{made[1]}, this one makes {found[0]} of "
            f"{found[2]}×{found[1]}"
        )


def about(settings: Settings, world: World, check: Callable[[Manifest], None]) -> dict[str, Any]:
    """The bundle and the settings it will be run with, checked against a first request."""
    manifest = Bundle.open(settings.bundle).manifest
    check(manifest)
    first, _ = world.request(world.scene(settings.seeds[0]), 0).resolve(manifest)
    names = ("solver", "steps", "shift", "guidance", "concept_guidance")
    return {
        "bundle": manifest.name,
        "precision": manifest.precision,
        "written_by": manifest.written_by,
        **{name: getattr(first, name) for name in names},
    }


def judged(
    settings: Any,
    world_of: Callable[[Any], World],
    generate: Generate | None = None,
    keep: int = 0,
    progress: bool = False,
) -> list[Result]:
    """Every request judged, in the order of the seeds.

    Args: settings: ``Settings``; world_of: its world, a function of a module, which workers call again;
    generate: what is judged instead of the bundle, which is then not opened (one worker only); keep: of how
    many requests, from the first, the videos are kept; progress: show a bar on standard error.
    """
    results = []
    with bar(len(settings.seeds), "score", progress) as advance:
        for result in _judge_all(settings, world_of, generate, keep):
            results.append(result)
            advance()
    return results


def summary(results: Sequence[Result], rivals: Mapping[str, int]) -> dict[str, Any]:
    """Shares of contests won: ``measure`` + video (``pair_binding_swapped``) to 0..1, None without contests.

    rivals: how many hypotheses every measure lets compete. Beside the shares ``standard_errors`` (over
    requests, since the concepts of one share a video) and ``chance``.
    """
    shares: dict[str, Any] = {}
    errors: dict[str, float | None] = {}
    boxes = [NO_BOXES] if any(NO_BOXES in result.won for result in results) else []
    for video in (ASKED, NO_CONCEPTS, SWAPPED, *boxes):
        for measure in rivals:
            won = [result.won.get(video, {}).get(measure) for result in results]
            means = [float(np.mean(each)) for each in won if each]
            shares[measure + video] = rounded(np.mean(means)) if means else None
            spread = rounded(np.std(means, ddof=1) / len(means) ** 0.5) if means[1:] else None
            errors[measure + video] = spread
    chance = {measure: rounded(1 / count) if count > 1 else None for measure, count in rivals.items()}
    return shares | {"standard_errors": errors, "chance": chance}


def seconds_per_video(results: Sequence[Result]) -> float | None:
    """The median, None where none was generated."""
    seconds = [second for result in results for second in result.seconds]
    return rounded(np.median(seconds)) if seconds else None


def rounded(value: float | np.floating) -> float:
    """To four places."""
    return round(float(value), 4)


def _videos(
    settings: Settings, world: World, generate: Generate | None, seed: int
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The videos to judge for a seed, and the seconds that generating each took."""
    if settings.source != "model":
        other = seed + 1 if seed + 1 in settings.seeds else settings.seeds[0]
        shown = seed if settings.source == "truth" else other
        return {ASKED: world.true_video(world.scene(shown))}, []
    assert generate is not None
    scene, seconds, videos = world.scene(seed), [], {}
    requests = {ASKED: world.request(scene, 0)}
    if settings.controls:
        requests[NO_CONCEPTS] = world.request(scene, None)
        if settings.concepts > 1:
            requests[SWAPPED] = world.request(scene, 1)
        if requests[ASKED].boxes:
            requests[NO_BOXES] = replace(requests[ASKED], boxes={})
    for name, request in requests.items():
        start = time.perf_counter()
        videos[name] = generate(request).frames
        seconds.append(time.perf_counter() - start)
    return videos, seconds


def _judge(settings: Settings, world: World, generate: Generate | None, keep: int, seed: int) -> Result:
    videos, seconds = _videos(settings, world, generate, seed)
    judge = world.judge(world.scene(seed))
    won = {name: judge(video) for name, video in videos.items()}
    return Result(seed, won, seconds, videos if seed - settings.seeds[0] < keep else {})


def _judge_all(
    settings: Settings, world_of: Callable[[Any], World], generate: Generate | None, keep: int
) -> Iterator[Result]:
    if settings.workers == 1 or generate is not None:
        generate, world = generate or _open(settings), world_of(settings)
        for seed in settings.seeds:
            yield _judge(settings, world, generate, keep, seed)
        return
    work = functools.partial(_work, settings, world_of, keep)
    yield from in_processes(work, settings.seeds, settings.workers)


def _open(settings: Settings) -> Generate | None:
    """The bundle's pipeline as a function, None where nothing is generated."""
    if settings.source != "model":
        return None
    threads = 1 if settings.threads is None and settings.workers > 1 else settings.threads
    pipeline = Pipeline.from_bundle(settings.bundle, device=settings.device, threads=threads)
    return lambda request: pipeline.generate(request)[0]


_open_once = functools.cache(_open)  # in a worker, so that what goes wrong is raised where it is awaited


def _work(settings: Settings, world_of: Callable[[Any], World], keep: int, seed: int) -> Result:
    return _judge(settings, world_of(settings), _open_once(settings), keep, seed)
