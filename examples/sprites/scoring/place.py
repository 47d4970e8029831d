"""Whether boxes place concepts: the same requests with boxes and without, told in words that agree with the
boxes, that say no place, that say other places, and that say that nothing moves.

The boxes are those of a scene's sprites, frame by frame, as its true video has them. ``located`` is how often
a concept's own picture is found inside of its box (see ``locating``), of the frames that are looked at;
``pair_binding``, ``identity`` and ``noun`` are those of ``measures``, in the place of the box.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from conceptmaster import __version__
from conceptmaster.atomic_write import check_output
from conceptmaster.errors import InputError
from conceptmaster.runtime.bundle_format.find import Bundle
from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.progress import bar
from conceptmaster.runtime.request import Request

from ..arguments import add_quiet, check_seeds, option, options_from, seed_range
from ..world.draw import look_of
from ..world.requesting import concepts, references
from ..world.scenes import MAX_CONCEPTS, PLACES, SIZE, Scene, tell
from .judging import Generate, rounded
from .locating import LOOKED_AT, locate
from .measures import Judge
from .reports import percent, write_json
from .score import check_bundle, check_wishes, judged_scene
from .sheet import Row, save_sheet

TOLD = ("as its box", "no place", "another place", "stands still")
"""What a caption says of each concept's place; the last no place and no motion either."""
MEASURES = ("located", "pair_binding", "identity", "noun")
SHOWN = ((TOLD[1], False), (TOLD[1], True), (TOLD[2], True), (TOLD[3], True))
"""What is told, and whether with boxes, of the videos on a sheet."""
SHEET_ROWS = 4
PLACE = """\
Generates every seed's request with the true boxes of its sprites and without any, from the same noise, for
captions that say the place of each box, none, another one, and that nothing moves; and counts from the frames
how often a concept is inside of its box. The bundle must take boxes: `conceptmaster export … --boxes`.
"""


@dataclass(frozen=True)
class PlaceOptions:
    """What to place and how. Raises InputError."""

    seeds: range = option(range(32), "of the scenes (0:32)", type=seed_range, metavar="A:B")
    bundle: str = option("sprites", "bundle that takes boxes, a path", metavar="NAME")
    concepts: int = option(2, f"concepts in a scene, 1 to {MAX_CONCEPTS}", metavar="K")
    steps: int | None = option(None, "model evaluations (the bundle's default)", metavar="N")
    guidance: float | None = option(None, "(the bundle's default)", metavar="G")
    threads: int | None = option(None, "CPU threads (one per core)", metavar="N")

    def __post_init__(self) -> None:
        check_wishes(self.concepts, False)
        check_seeds(self.seeds)
        Request("checks", steps=self.steps, guidance=self.guidance)


def told(scene: Scene, how: str) -> str:
    """The scene's caption with what it says of places changed, see ``TOLD``."""
    actors, places = scene.actors, list(PLACES)
    if how == TOLD[3]:
        actors = tuple(replace(actor, motion="still") for actor in actors)
    cells: list[tuple[int, int] | None] = [None for _ in actors]
    if how == TOLD[0]:
        cells = [actor.cell for actor in actors]
    elif how == TOLD[2]:
        cells = [places[(places.index(actor.cell) + 4) % len(places)] for actor in actors]
    return tell(np.random.default_rng(0), actors, scene.background, plainly=True, cells=cells)


def request_of(scene: Scene, how: str, boxed: bool, options: PlaceOptions) -> Request:
    """The scene's request in such words, with the boxes of its sprites in every frame, or with none."""
    boxes = {actor.label: dict(enumerate(actor.boxes().tolist())) for actor in scene.actors}
    return Request(
        told(scene, how),
        concepts(scene, references(scene)),
        steps=options.steps,
        guidance=options.guidance,
        seed=scene.seed,
        boxes=boxes if boxed else {},
    )


def located(scene: Scene, frames: np.ndarray) -> list[float]:
    """Of each concept the share of frames in which it is inside of its box. frames uint8 [17,64,64,3]."""
    looked = frames[list(LOOKED_AT)]
    shares = []
    for actor in scene.actors:
        at = locate(looked, actor.noun, actor.identity, actor.radius, look_of(actor.motion)) / SIZE  # [F,2]
        box = actor.boxes()[list(LOOKED_AT)]  # [F,4]
        shares.append(float(((at > box[:, :2]) & (at < box[:, 2:])).all(1).mean()))
    return shares


Shares = dict[tuple[str, bool], dict[str, list[float]]]
"""By what is told and whether there are boxes: measure → one share per request."""


def place(
    options: PlaceOptions, *, generate: Generate | None = None, keep: int = 0, progress: bool = False
) -> tuple[dict[str, Any], list[Row]]:
    """The report, and of the first ``keep`` requests a row of a sheet each.

    generate: what makes the videos instead of the bundle. Raises InputError, BundleError and what generating
    raises.
    """
    start, about = time.perf_counter(), {}
    if generate is None:
        manifest = Bundle.open(options.bundle).manifest
        check_bundle(manifest)
        if not manifest.takes_boxes:
            raise InputError(
                f"the bundle {manifest.name!r} cannot place concepts: name one that was exported with "
                "`--boxes`, with --bundle"
            )
        pipeline = Pipeline.from_bundle(options.bundle, threads=options.threads)
        about = {"bundle": manifest.name, "precision": manifest.precision, "written_by": manifest.written_by}
        generate = lambda request: pipeline.generate(request)[0]  # noqa: E731
    shares: Shares = {(how, boxed): {m: [] for m in MEASURES} for how in TOLD for boxed in (False, True)}
    rows: list[Row] = []
    with bar(len(options.seeds) * len(shares), "place", progress) as advance:
        for seed in options.seeds:
            scene = judged_scene(seed, options.concepts, False)
            judge = Judge(scene)
            videos: dict[tuple[str, bool], np.ndarray] = {}
            for (how, boxed), found in shares.items():
                frames = generate(request_of(scene, how, boxed, options)).frames
                won = judge(frames)
                found["located"].append(float(np.mean(located(scene, frames))))
                for measure in MEASURES[1:]:
                    if won[measure]:
                        found[measure].append(float(np.mean(won[measure])))
                videos[how, boxed] = outlined(scene, frames)
                advance()
            if len(rows) < keep:
                shown = {_named(*key): videos[key] for key in SHOWN}
                rows.append(Row(f"seed {seed}: {scene.caption}", references(scene), shown))
    report = {
        "world": "sprites",
        "seeds": [options.seeds.start, options.seeds.stop],
        "concepts": options.concepts,
        "steps": options.steps,
        "guidance": options.guidance,
        **about,
        "shares": dict(_told(shares)),
        "seconds": round(time.perf_counter() - start, 2),
        "machine": {"processor": platform.machine(), "device": "cpu", "threads": options.threads},
        "versions": {"conceptmaster": __version__, "numpy": np.__version__},
    }
    return report, rows


def _told(shares: Shares) -> Iterator[tuple[str, dict[str, Any]]]:
    for (how, boxed), found in shares.items():
        means = {
            m: [rounded(np.mean(v)), rounded(np.std(v, ddof=1) / len(v) ** 0.5) if v[1:] else None]
            for m, v in found.items()
            if v
        }
        yield _named(how, boxed), means


def _named(how: str, boxed: bool) -> str:
    return f"{how}, {'boxes' if boxed else 'without'}"


def outlined(scene: Scene, frames: np.ndarray) -> np.ndarray:
    """The frames, twice as large, with each concept's box in a colour of its own."""
    shown = []
    for number, frame in enumerate(frames):
        image = Image.fromarray(frame.repeat(2, 0).repeat(2, 1))
        draw = ImageDraw.Draw(image)
        for actor, colour in zip(scene.actors, ("red", "blue", "black"), strict=False):
            draw.rectangle([float(side) for side in actor.boxes()[number] * (2 * SIZE - 1)], outline=colour)
        shown.append(np.asarray(image))
    return np.stack(shown)


def table(report: dict[str, Any]) -> str:
    """A line for each caption with boxes and without, in percent with standard errors."""
    lines = [f"{'':24}" + "".join(f"{measure:>16}" for measure in MEASURES)]
    for name, found in report["shares"].items():
        cells = [percent(*found.get(measure, (None, None))) for measure in MEASURES]
        lines.append(f"{name:24}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``place``."""
    from ..arguments import add_options

    parser.description = PLACE
    add_options(parser, PlaceOptions)
    add_quiet(parser)
    parser.add_argument("--output", metavar="FILE.json", help="also write the report")
    parser.add_argument("--sheet", metavar="FILE.png", help=f"also draw the first {SHEET_ROWS} requests")


def run(args: argparse.Namespace) -> int:
    """Runs `place`."""
    options = options_from(PlaceOptions, args)
    output = None if args.output is None else check_output(Path(args.output), (".json",))
    sheet = None if args.sheet is None else check_output(Path(args.sheet), (".png",))
    report, rows = place(options, keep=SHEET_ROWS if sheet else 0, progress=not args.quiet)
    if output is not None:
        write_json(output, report)
    if sheet is not None:
        save_sheet(rows, sheet)
    print(table(report))
    return 0
