"""The training's curves as one picture, drawn from its logs as they were written."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptmaster.atomic_write import check_output, replacing
from conceptmaster.errors import InputError

from ..scoring.plot import import_matplotlib

LOGS = Path(__file__).parent / "logs"


@dataclass(frozen=True)
class Panel:
    """A log's file, its x axis, its curves and their title."""

    file: str
    x: str
    curves: tuple[str, ...]
    title: str


PANELS = (
    Panel("vae-log.jsonl", "step", ("psnr",), "VAE: PSNR of held-out clips, dB"),
    Panel("model-log.jsonl", "samples", ("flow",), "videos: loss of the velocity"),
    Panel("model-log.jsonl", "samples", ("layout", "story", "portrait"), "videos: training-only heads"),
    Panel(
        "model-log.jsonl",
        "samples",
        ("texture", "look_texture", "eye_texture"),
        "share of textures named right: queries, video, eye",
    ),
    Panel(
        "model-log.jsonl",
        "samples",
        ("pattern", "look_pattern", "eye_pattern"),
        "how textures run, squared error: the same",
    ),
    Panel(
        "model-log.jsonl",
        "samples",
        ("probe_with", "probe_without", "probe_swapped"),
        "videos: error at noise 0.85, held-out looks",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``curves``."""
    parser.add_argument(
        "--logs", type=Path, default=LOGS, metavar="DIR", help="folder of the logs (the shipped model's)"
    )
    parser.add_argument("--output", required=True, metavar="FILE.png", help="the picture")


def run(args: argparse.Namespace) -> int:
    """Draw the curves; returns 0. Raises InputError for logs that are missing or damaged."""
    output = check_output(Path(args.output), (".png",))
    records = {name: _read(args.logs / name) for name in sorted({panel.file for panel in PANELS})}
    draw(records, output)
    print(output)
    return 0


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError as error:
        raise InputError(f"no log at {path}: `train` writes one") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not a log, one JSON object a line: {error}") from error


def draw(records: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Write the picture, whole or not at all. Raises MissingDependency without matplotlib."""
    figure = import_matplotlib()(figsize=(15, 6.5), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        own = [record for record in records[panel.file] if "phase" not in record]
        for name in panel.curves:
            points = [(r[panel.x], r[name]) for r in own if name in r and panel.x in r]
            if points:
                axes.plot(*zip(*points, strict=True), label=name)
        axes.set(title=panel.title, xlabel=panel.x)
        axes.grid(alpha=0.3)
        if len(panel.curves) > 1:
            axes.legend()
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
