"""MC-Bench of this world: one table of the shipped model, its controls, int8 and other numbers of steps."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster.benchmarks import reports
from conceptmaster.benchmarks.mc_bench import summary
from conceptmaster.benchmarks.mc_bench.measures import (
    MEASURES,
    Caption,
    Concepts,
    Imaging,
    Motion,
    Part,
    Values,
    Watched,
)
from conceptmaster.benchmarks.mc_bench.regions import Finder
from conceptmaster.benchmarks.mc_bench.samples import Sample
from conceptmaster.benchmarks.mc_bench.scoring import Scored, score
from conceptmaster.errors import ConceptMasterError, RequestWarning
from conceptmaster.hashed import sha256_file
from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.progress import bar
from conceptmaster.runtime.request import Concept, Request
from conceptmaster.runtime.video import Video

from ..scoring.measures import Judge
from ..world.draw import draw_clip
from ..world.scenes import FPS
from .admission import FRAMES, Admission, admit, margin
from .admission import told as admission_told
from .scorer import Looks, Names, open_scorer
from .told import ToldBoxes, ToldMasks, name_of, scene_of, write_set


@dataclass(frozen=True)
class Row:
    """A row of the table. bundle: None for the true videos; turn: concept i gets picture i + turn, None
    leaves the concepts out; steps: None for the bundle's own number."""

    name: str
    bundle: str | None = "sprites"
    turn: int | None = 0
    steps: int | None = None


ASKED = "sprites, 4 steps"
ROWS = (
    Row("true videos", None),
    Row(ASKED),
    Row("without concepts", turn=None),
    Row("pictures swapped", turn=1),
    Row("int8", "sprites-int8"),
    Row("8 steps", steps=8),
    Row("2 steps", steps=2),
    Row("1 step", steps=1),
)


class Exact:
    """The exact judge and the scorer's margins beside MC-Bench's measures: what admission is of."""

    name = "exact"

    def __init__(self, looks: Looks, about: Any) -> None:
        self.looks, self.about = looks, about

    def measure(self, watched: Watched) -> Values:
        """``judge``: the judge's margin; ``scorer``: the scorer's; ``pair binding``: the share of concepts
        that win."""
        name = watched.sample.name
        judge = Judge(scene_of(name))
        found = ToldBoxes().find(watched.frames, watched.sample.labels, watched.indices, name)
        seen = [
            [
                None if region is None else self.looks.pictures([region.cut(frame)])[0]
                for region, frame in zip(of, watched.frames, strict=True)
            ]
            for of in found
        ]
        frames = watched.clip.frames
        return {
            "judge": float(np.mean(judge.margins(frames))),
            "scorer": margin(seen, self.looks.pictures(watched.pictures)),
            "pair binding": float(np.mean(judge(frames)["pair_binding"])),
        }


def make_videos(row: Row, samples: Sequence[Sample], folder: Path, progress: bool) -> None:
    """The videos of a row that are missing: 64×64, all colours kept (4:4:4)."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [sample for sample in samples if not (folder / f"{sample.name}.mp4").exists()]
    if not left:
        return
    generate = _truth if row.bundle is None else Pipeline.from_bundle(row.bundle).generate
    with bar(len(left), row.name, progress) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", RequestWarning)  # that a model was not made for one step is known
        for sample in left:
            generate(_request(row, sample))[0].save(folder / f"{sample.name}.mp4", scale=1, chroma="444")
            advance()


def _truth(request: Request) -> list[Video]:
    return [Video(draw_clip(scene_of(name_of(request.seed)))[0], FPS, request.seed, request.prompt)]


def _request(row: Row, sample: Sample) -> Request:
    concepts: tuple[Concept, ...] = ()
    if row.turn is not None:
        turned = sample.pictures[row.turn :] + sample.pictures[: row.turn]
        concepts = tuple(Concept(label, path) for label, path in zip(sample.labels, turned, strict=True))
    return Request(sample.caption, concepts, steps=row.steps, seed=sample.seed)


def bench(
    output: Path, requests: int, weights: Path, rows: Sequence[Row] = ROWS, progress: bool = True
) -> tuple[dict[str, Any], Admission]:
    """All rows, scored. What is in ``output`` from an earlier run is not made or computed again.

    Returns: the report, and whether its scorer may be believed.
    """
    start, scorer = time.perf_counter(), open_scorer(weights)
    looks, names, digest = Looks(scorer), Names(scorer), sha256_file(weights)
    about = {"frames": FRAMES, "scorer": digest}

    def concepts(finder: Finder) -> Concepts:
        return Concepts(lambda: finder, finder.version, lambda: names, lambda: looks, about)

    parts: list[Part] = [
        Motion(),
        Imaging(FRAMES),
        Caption(lambda: names, about),
        concepts(ToldBoxes()),
        concepts(ToldMasks()),
        Exact(looks, about),
    ]
    samples = write_set(range(requests), output / "pictures")
    scored: dict[str, list[Scored]] = {}
    for row in rows:
        folder = output / row.name.replace(" ", "-").replace(",", "")
        make_videos(row, samples, folder, progress)
        scored[row.name] = score(samples, folder, folder / "scores", parts, FRAMES, progress)
        reasons = {one.sample.name: one.skipped for one in scored[row.name] if one.skipped}
        lost = list(reasons)
        if lost:
            raise ConceptMasterError(f"{folder}: {lost[0]} {reasons[lost[0]]}; delete it and go on")
    margins = {row: [one.values["scorer"] for one in of] for row, of in scored.items()}
    judged = {row: [one.values["judge"] for one in of] for row, of in scored.items()}
    admission = admit(scorer, margins, judged, ASKED)
    report = {
        "benchmark": "MC-Bench, sprites",
        "commit": reports.commit(),
        "machine": reports.machine(summary.PACKAGES + ("onnxruntime",)),
        "scorer": {"file": weights.name, "sha256": digest, "admission": admission_told(admission)},
        "settings": {"requests": requests, "frames": FRAMES},
        "rows": {name: means(of) for name, of in scored.items()},
        "less_asked": {n: means(less(of, scored[ASKED])) for n, of in scored.items() if n != ASKED},
        "samples": {
            name: {one.sample.name: {k: round(v, 5) for k, v in one.values.items()} for one in of}
            for name, of in scored.items()
        },
        "seconds": round(time.perf_counter() - start, 1),
    }
    return report, admission


BESIDE = ("judge", "pair binding")
"""The exact judge's, beside MC-Bench's."""


def means(scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """By measure the mean over requests with its interval."""
    found = {}
    for measure in (*MEASURES, *BESIDE):
        values = [one.values[measure] for one in scored if measure in one.values]
        if values:
            low, high = summary.interval(values)
            found[measure] = {
                "mean": round(float(np.mean(values)), 5),
                "low": round(low, 5),
                "high": round(high, 5),
            }
    return found


def less(scored: Sequence[Scored], other: Sequence[Scored]) -> list[Scored]:
    """The differences of two rows, request by request, which are the same in both."""
    return [
        Scored(a.sample, values={name: a.values[name] - b.values[name] for name in a.values})
        for a, b in zip(scored, other, strict=True)
    ]


def table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown: a line for each measure, a column for each row of the bench, with half the interval's
    width."""
    lines = [f"| | {' | '.join(rows)} |", f"| --- |{' --- |' * len(rows)}"]
    arrows = {"higher": " ↑", "lower": " ↓", "": ""}
    for measure in (*MEASURES, *BESIDE):
        cells = [of.get(measure) for of in rows.values()]
        if measure == "found" or not any(cells):
            continue
        arrow = arrows[MEASURES[measure].better] if measure in MEASURES else " ↑"
        shown = ["–" if c is None else f"{summary.digits(c['mean'])} ± {_half(c)}" for c in cells]
        lines.append(f"| {measure}{arrow} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _half(cell: Mapping[str, float]) -> str:
    half = (cell["high"] - cell["low"]) / 2
    return f"{half:.3f}" if abs(cell["mean"]) < 10 else f"{half:.2f}"
