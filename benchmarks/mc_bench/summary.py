"""From the measures of samples to those of a system: means, intervals, a table, a report, sheets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conceptmaster.atomic_write import replacing
from conceptmaster.benchmarks import reports
from conceptmaster.runtime import pictures, sheet

from . import videos
from .measures import MEASURES, evenly
from .scenarios import OTHER, SCENARIOS
from .scoring import WHITE, Scored

DRAWS = 2000
CONFIDENCE = 0.95
ALL = "all"
ROWS, FRAMES, SIDE = 6, 6, 96
PACKAGES = ("numpy", "opencv-python-headless", "scipy", "scikit-video", "torch", "transformers", "av")


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean over samples (percentiles, DRAWS draws): CONFIDENCE of them lie
    inside."""
    found = np.asarray(values, np.float64)
    rng = np.random.Generator(np.random.Philox(key=[seed, 43]))
    means = found[rng.integers(len(found), size=(DRAWS, len(found)))].mean(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def summary(scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, float]]]:
    """By scenario, then ``all``; by measure: mean, low, high and how many samples it is of."""
    groups: dict[str, list[Scored]] = {name: [] for name in (*(s.name for s in SCENARIOS), OTHER)}
    for one in scored:
        groups[one.sample.scenario].append(one)
    told = {name: _means(group) for name, group in groups.items()}
    return {name: means for name, means in told.items() if means} | {ALL: _means(scored)}


def _means(scored: Iterable[Scored]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    scored = list(scored)
    for measure in MEASURES:
        values = [one.values[measure] for one in scored if measure in one.values]
        if values:
            low, high = interval(values)
            entry = {"mean": float(np.mean(values)), "low": low, "high": high, "samples": len(values)}
            found[measure] = {name: round(value, 5) for name, value in entry.items()}
    return found


def report(
    scored: Sequence[Scored], models: Mapping[str, Any], settings: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """All of it, as JSON has it."""
    return {
        "benchmark": "MC-Bench",
        "commit": reports.commit(),
        "machine": reports.machine(PACKAGES),
        "models": dict(models),
        "settings": dict(settings),
        "measures": {name: vars(measure) for name, measure in MEASURES.items()},
        "seconds": round(seconds, 1),
        "summary": summary(scored),
        "samples": {
            one.sample.name: {name: round(value, 6) for name, value in one.values.items()}
            for one in scored
            if one.skipped is None
        },
        "skipped": {one.sample.name: one.skipped for one in scored if one.skipped is not None},
    }


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A Markdown table: a row for each measure, a column for each scenario, then all with the interval."""
    scenarios = [name for name in found if name != ALL]
    lines = [f"| | {' | '.join(scenarios)} | all | 95 % |", f"| --- |{' --- |' * (len(scenarios) + 2)}"]
    arrows = {"higher": " ↑", "lower": " ↓", "": ""}
    for measure, about in MEASURES.items():
        if measure not in found[ALL]:
            continue
        cells = [number(found[name].get(measure)) for name in scenarios]
        overall = found[ALL][measure]
        between = f"{digits(overall['low'])} to {digits(overall['high'])}"
        row = [f"{measure}{arrows[about.better]}", *cells, number(overall), between]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def number(entry: Mapping[str, float] | None) -> str:
    """A mean in a table."""
    return "–" if entry is None else digits(entry["mean"])


def digits(value: float) -> str:
    """Three after the point below 10, else two."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def ranked(scored: Sequence[Scored], measure: str) -> list[Scored]:
    """Those that have the measure, the best first; what is not better either way, the highest first."""
    there = [one for one in scored if measure in one.values]
    return sorted(there, key=lambda one: one.values[measure], reverse=MEASURES[measure].better != "lower")


def save_sheet(scored: Sequence[Scored], measure: str, path: Path) -> None:
    """The samples as a PNG, one under the other: value and caption, pictures, frames. Raises OSError."""
    parts = [_drawn(one, measure) for one in scored[:ROWS]]
    image = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    top = 0
    for part in parts:
        image.paste(part, (0, top))
        top += part.height
    with replacing(path) as temporary:
        sheet.save_png(image, temporary)


def _drawn(one: Scored, measure: str) -> Image.Image:
    assert one.video is not None
    frames = videos.read(one.video).frames
    shown = [
        (label, pictures.load(picture, SIDE, WHITE, f"the picture of {label!r}"))
        for label, picture in zip(one.sample.labels, one.sample.pictures, strict=True)
    ]
    told = f"{measure} {digits(one.values[measure])} · {one.sample.name}: {one.sample.caption}"
    return sheet.draw(frames[list(evenly(len(frames), FRAMES))], told, shown, FRAMES, None)
