"""The training's curves as one picture, drawn from its logs as they were written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from conceptmaster.runtime.errors import InputError
from conceptmaster.runtime.files import check_output, replacing

from .plot import import_matplotlib

LOGS = Path(__file__).parent / "training"
PANELS = (
    ("vae-log.jsonl", "step", ("psnr",), "VAE: PSNR of held-out clips, dB"),
    ("model-log.jsonl", "samples", ("flow",), "model: loss of the velocity"),
    ("model-log.jsonl", "samples", ("layout", "story", "portrait"), "model: training-only heads"),
    (
        "model-log.jsonl",
        "samples",
        ("probe_with", "probe_without", "probe_swapped"),
        "model: error at noise 0.85, held-out looks",
    ),
)
"""File, its x axis, its curves, and the panel's title."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``curves``."""
    parser.add_argument(
        "--logs", type=Path, default=LOGS, metavar="DIR", help="folder of the logs (the shipped model's)"
    )
    parser.add_argument("--output", required=True, metavar="FILE.png", help="the picture")


def run(args: argparse.Namespace) -> int:
    """Draw the curves; returns 0. Raises InputError for logs that are missing or damaged."""
    output = check_output(Path(args.output), (".png",))
    records = {name: _read(args.logs / name) for name in sorted({panel[0] for panel in PANELS})}
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
    figure = import_matplotlib()(figsize=(11, 6.5), layout="constrained")
    for axes, (file, x, names, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name in names:
            points = [(record[x], record[name]) for record in records[file] if name in record and x in record]
            axes.plot(*zip(*points, strict=True), label=name)
        axes.set(title=title, xlabel=x)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
