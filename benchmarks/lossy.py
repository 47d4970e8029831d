"""How far the torch backend's lossy options take the shipped model's videos from its exact ones.

    python -m conceptmaster.benchmarks.lossy [--write] [--seeds N]

Every option against the same bundle and seed without it, over the example requests: how much of the
transformer is still computed (branches evaluated, in parts of all), how far the frames are (mean absolute
difference in 1/255, and peak signal-to-noise ratio over all of them). Errors only: nothing here is timed, so
any machine will do. `--write` also writes benchmarks/results/lossy.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster import Pipeline
from conceptmaster.runtime.backends.torch_options import TorchOptions
from conceptmaster.runtime.progress import bar
from conceptmaster.runtime.request import Request

from .alternating import machine
from .gpu_timing import commit

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "results" / "lossy.json"
REQUESTS = ROOT / "examples" / "sprites" / "requests"
BUNDLE = "sprites"
OPTIONS = (
    *(TorchOptions(skip_guidance=part) for part in (0.25, 0.5)),
    *(TorchOptions(step_cache=change) for change in (0.05, 0.1, 0.2)),
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


def generate(options: TorchOptions, wanted: list[Request], show: bool) -> tuple[np.ndarray, int]:
    """(frames uint8 [videos,F,H,W,3], branches evaluated)."""
    pipeline = Pipeline.from_bundle(BUNDLE, backend="torch", options=options)
    frames = []
    with bar(len(wanted), name_of(options), show) as advance:
        for request in wanted:
            frames.append(pipeline.generate(request)[0].frames)
            advance()
    backend: Any = pipeline.backend
    return np.stack(frames), backend.stepper.evaluations


def difference(found: np.ndarray, exact: np.ndarray) -> dict[str, float | None]:
    """Of frames, uint8 both; no ratio where they are the same."""
    error = found.astype(np.float64) - exact
    square = float((error**2).mean())
    return {
        "mean_abs_255": float(np.abs(error).mean()),
        "psnr_db": 10 * math.log10(255**2 / square) if square else None,
    }


def run(seeds: int, steps: int | None = None, show: bool = False) -> dict[str, Any]:
    """The report."""
    wanted = requests(seeds, steps)
    exact, whole = generate(TorchOptions(), wanted, show)
    rows = list(_rows(wanted, exact, whole, show))
    manifest = Pipeline.from_bundle(BUNDLE).bundle.folder / "manifest.json"
    return {
        "bundle": BUNDLE,
        "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "videos": len(wanted),
        "steps": steps,
        "machine": machine(),
        "commit": commit(),
        "command": "python -m conceptmaster.benchmarks.lossy --write",
        "rows": rows,
    }


def _rows(wanted: list[Request], exact: np.ndarray, whole: int, show: bool) -> Iterator[dict[str, Any]]:
    for options in OPTIONS:
        frames, evaluated = generate(options, wanted, show)
        yield {
            "options": name_of(options),
            "evaluated": evaluated / whole,
            **difference(frames, exact),
        }


def table(report: dict[str, Any]) -> str:
    """For people, as in docs/performance.md."""
    lines = ["| options | evaluated | mean difference, 1/255 | PSNR, dB |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{row['options']}` | {row['evaluated']:.0%} | {row['mean_abs_255']:.2f} | {_ratio(row)} |"
        for row in report["rows"]
    ]
    return "\n".join(lines)


def _ratio(row: dict[str, Any]) -> str:
    return "the same" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"


def main() -> int:
    """The command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.relative_to(ROOT)}")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="of each example request (2)")
    arguments = parser.parse_args()
    report = run(arguments.seeds, show=sys.stderr.isatty())
    if arguments.write:
        REPORT.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(table(report))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
