"""How far the torch backend's lossy options take the shipped model's videos from its exact ones.

    python -m conceptmaster.benchmarks.lossy [--write] [--seeds N]

Every option against the same bundle and seed without it, over the example requests, at the bundle's own
number of steps and at a larger one: how much of the transformer is still computed (branches evaluated, in
parts of all), how far the frames are (mean absolute difference in 1/255, and peak signal-to-noise ratio over
all of them). Errors only: nothing here is timed, so any machine will do. `--write` also writes
benchmarks/results/lossy.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from conceptmaster import Pipeline
from conceptmaster.runtime.backends.pytorch.options import TorchOptions
from conceptmaster.runtime.progress import bar
from conceptmaster.runtime.request import Request

from .reports import RESULTS, ROOT, commit, machine, write

REPORT = RESULTS / "lossy.json"
REQUESTS = ROOT / "examples" / "sprites" / "requests"
BUNDLE = "sprites"
STEPS = (None, 20)
"""None: the bundle's own."""
OPTIONS = (
    *(TorchOptions(skip_guidance=part) for part in (0.25, 0.5)),
    *(TorchOptions(step_cache=change) for change in (0.1, 0.2, 0.4)),
    TorchOptions(dtype="bfloat16"),
    TorchOptions(tier="high"),
)


def name_of(options: TorchOptions) -> str:
    """As on the command line."""
    words = [*([f"--dtype {options.dtype}"] if options.dtype else []), *options.lossy]
    return " ".join(words) or "exact"


def requests(seeds: int, steps: int | None) -> list[Request]:
    """The example requests, each with so many seeds; steps: None for the bundle's own."""
    found = [Request.from_json(path) for path in sorted(REQUESTS.glob("*/request.json"))]
    return [
        dataclasses.replace(request, seed=1000 + seed, steps=steps)
        for request in found
        for seed in range(seeds)
    ]


def generate(
    options: TorchOptions, seeds: int, steps: tuple[int | None, ...], show: bool
) -> dict[int, tuple[np.ndarray, int]]:
    """Number of steps -> (frames uint8 [videos,F,H,W,3], branches evaluated)."""
    pipeline = Pipeline.from_bundle(BUNDLE, backend="torch", options=options)
    backend: Any = pipeline.backend
    found = {}
    for count in steps:
        wanted, frames = requests(seeds, count), []
        before = backend.stepper.evaluations if backend.stepper else 0
        with bar(len(wanted), name_of(options), show) as advance:
            for request in wanted:
                frames.append(pipeline.generate(request)[0].frames)
                advance()
        evaluated = backend.stepper.evaluations - before
        found[count or pipeline.manifest.defaults.steps] = np.stack(frames), evaluated
    return found


def difference(found: np.ndarray, exact: np.ndarray) -> dict[str, float | None]:
    """Of frames, uint8 both; no ratio where they are the same."""
    error = found.astype(np.float64) - exact
    square = float((error**2).mean())
    return {
        "mean_abs_255": float(np.abs(error).mean()),
        "psnr_db": 10 * math.log10(255**2 / square) if square else None,
    }


def run(seeds: int, steps: tuple[int | None, ...] = STEPS, show: bool = False) -> dict[str, Any]:
    """The report."""
    exact = generate(TorchOptions(), seeds, steps, show)
    rows = list(_rows(exact, seeds, steps, show))
    manifest = Pipeline.from_bundle(BUNDLE).bundle.folder / "manifest.json"
    return {
        "bundle": BUNDLE,
        "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "videos": len(requests(seeds, None)),
        "machine": machine(),
        "commit": commit(),
        "command": "python -m conceptmaster.benchmarks.lossy --write",
        "rows": rows,
    }


def _rows(
    exact: dict[int, tuple[np.ndarray, int]], seeds: int, steps: tuple[int | None, ...], show: bool
) -> Iterator[dict[str, Any]]:
    for options in OPTIONS:
        for count, (frames, evaluated) in generate(options, seeds, steps, show).items():
            right, whole = exact[count]
            about = {"options": name_of(options), "steps": count, "evaluated": evaluated / whole}
            yield {**about, **difference(frames, right)}


def table(report: dict[str, Any]) -> str:
    """For people, as in docs/performance.md."""
    lines = [
        "| options | steps | evaluated | mean difference, 1/255 | PSNR, dB |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *map(_line, report["rows"])])


def _line(row: dict[str, Any]) -> str:
    ratio = "the same" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
    cells = [
        f"`{row['options']}`",
        row["steps"],
        f"{row['evaluated']:.0%}",
        f"{row['mean_abs_255']:.2f}",
        ratio,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """The command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.relative_to(ROOT)}")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="of each example request (2)")
    arguments = parser.parse_args()
    report = run(arguments.seeds, show=sys.stderr.isatty())
    if arguments.write:
        write(report, REPORT)
    print(table(report))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
