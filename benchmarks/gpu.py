"""Checks every kernel and the model on a GPU, and measures them against their rivals only if all are right.

    python -m conceptmaster.benchmarks.gpu [--output FILE] [--minutes 9] [--only PART …]     (`make gpu`)

Parts: `kernels` (each against float64, then against its rivals), `forward` (Wan2.1 1.3B, 832x480x81, against
diffusers), `ladder` (a step with 4 concepts, from plain PyTorch up), `stages` and `video` (from request to
mp4), `scaling` (concepts, frames, pixels, 14B). Prints a table; the last line is JSON, also written to FILE:
hardware, clocks, versions, commit, the card's own matrix rate and copy bandwidth measured in the same run,
and for every case its shape, its error and milliseconds (p20, p50, p80) of ours and of each rival, timed in
turn as replayed CUDA graphs, so that no launch overhead is counted but where it is the point. What
`torch.compile` takes to compile is in none of them. What there was no time for is named. Nothing is timed
while a check is red. `python -m conceptmaster.benchmarks.gpu_plot FILE` draws it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from conceptmaster.kernels.tolerances import TOLERANCES

from . import gpu_model, gpu_video
from .gpu_cases import Case, Shapes, cases
from .gpu_timing import ROOT, commit, hardware, in_turn, roofline

REPORT = ROOT / "benchmarks" / "results" / "gpu.json"
ROUNDS = 30
MODEL_ROUNDS = 10
MOST_ROWS = 1024
"""Tokens of a case that are held to float64, spread over all of them."""
PARTS = ("kernels", "forward", "ladder", "stages", "video", "scaling")
KERNELS_SHARE = 0.4
"""Of the time: what timing kernels may use up before the model's turn."""


def check(case: Case) -> dict[str, Any]:
    """Ours against float64: {"ok", "relative_l2", "worst"}; worst: the largest error over what is allowed."""
    step = max(1, case.tokens // MOST_ROWS)
    rows = torch.arange(case.tokens - 1, -1, -step)[:MOST_ROWS].flip(0)
    found = case.ours()
    rows = rows.to((found[0] if isinstance(found, tuple) else found).device)
    expected = case.exact(rows)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    worst, l2 = 0.0, 0.0
    for ours, exact in pairs:
        error = ours[:, rows].double() - exact
        l2 = max(l2, float(error.norm() / exact.norm()))
        relative, absolute = TOLERANCES[case.dtype]
        allowed = absolute + relative * exact.abs()
        worst = max(worst, float((error.abs() / allowed).max()) if error.isfinite().all() else math.inf)
    ok = worst <= 1 if case.l2 is None else l2 <= case.l2 and math.isfinite(worst)
    return {"ok": ok, "relative_l2": l2, "worst": worst}


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds by name, "ours" first; the rivals' ratio to ours; our share of work and traffic."""
    rivals = {"ours": case.ours, **case.rivals, **(case.compiled if torch.cuda.is_available() else {})}
    timed = in_turn(rivals, ROUNDS)
    found = {name: timed[name] for name in rivals}
    ours = found["ours"].get("p50_ms")
    if ours is None:
        return found
    for entry in found.values():
        if "p50_ms" in entry:
            entry["times_ours"] = entry["p50_ms"] / ours
    found["ours"]["tflops"] = case.flops / ours / 1e9 or None
    found["ours"]["gb_per_s"] = case.moved_bytes / ours / 1e6 or None
    return found


def run(
    shapes: Shapes,
    seconds: float,
    say: Callable[[str], object] = print,
    parts: tuple[str, ...] = PARTS,
) -> dict[str, Any]:
    """Checks, then, if all is right, measurements; the report. Begins nothing after `seconds`."""
    start = time.perf_counter()

    def spent(share: float = 1.0) -> bool:
        return time.perf_counter() - start > share * seconds

    report: dict[str, Any] = {
        "ok": True,
        "hardware": hardware(),
        "commit": commit(),
        "rounds": ROUNDS,
        "parts": list(parts),
    }
    with torch.inference_mode():
        if "kernels" in parts:
            report["cases"] = _check_kernels(shapes, say)
            report["ok"] = all(row["ok"] for row in report["cases"].values())
        if not report["ok"]:
            say("a check is red: nothing is timed")
            return report
        report["roofline"] = roofline(shapes.new, shapes.small, ROUNDS)
        if "kernels" in parts:
            share = KERNELS_SHARE if len(parts) > 1 else 1.0
            report["left_out"] = _time_kernels(shapes, report["cases"], lambda: spent(share), say)
        _model_parts(shapes, report, parts, spent, say)
    report["seconds"] = time.perf_counter() - start
    if left := report.get("left_out"):
        say(f"no time was left for: {', '.join(left)}")
    return report


def _check_kernels(shapes: Shapes, say: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    rows = {}
    for case in _each(shapes):
        row = {"shape": case.shape, "dtype": case.dtype, **check(case)}
        rows[case.name] = row
        say(f"{'right' if row['ok'] else 'WRONG'}  {case.name:58} relative L2 {row['relative_l2']:.1e}")
    return rows


def _time_kernels(
    shapes: Shapes, rows: dict[str, Any], spent: Callable[[], bool], say: Callable[[str], object]
) -> list[str]:
    """Adds "timing" to the rows; the names of those that there was no time for."""
    left: list[str] = []
    for case in _each(shapes):
        if spent():
            left.append(case.name)
            continue
        rows[case.name]["timing"] = timing = measure(case)
        say(_line(case.name, timing))
    return left


def _model_parts(
    shapes: Shapes,
    report: dict[str, Any],
    parts: tuple[str, ...],
    spent: Callable[[], bool],
    say: Callable[[str], object],
) -> None:
    """Adds the parts that are of the whole model to the report, as long as there is time."""
    size = gpu_model.SMALL if shapes.small else gpu_model.Size()
    device, rounds = shapes.device, min(ROUNDS, MODEL_ROUNDS)
    steps = 2 if shapes.small else None
    todo: dict[str, Callable[[], Any]] = {
        "forward": lambda: gpu_model.forward(size, device, rounds, say),
        "ladder": lambda: gpu_model.ladder(size, device, rounds, say),
        "video": lambda: gpu_video.shipped(device, rounds, steps),
        "scaling": lambda: gpu_model.scaling(
            gpu_model.scaling_sizes(shapes.small), device, min(rounds, 3), spent
        ),
        "stages": lambda: gpu_video.stages(size, device, min(rounds, 5), spent, say),
    }
    for name, measured in todo.items():
        if name not in parts:
            continue
        if spent():
            report.setdefault("left_out", []).append(name)
            continue
        report[name] = measured()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    forward, roof = report.get("forward", {}), report["roofline"]
    if forward.get("lossless") is False or report.get("ladder", {}).get("ok") is False:
        report["ok"] = False
    if ours := forward.get("timing", {}).get("ours", {}).get("p50_ms"):
        forward["tflops"] = forward["flops"] / ours / 1e9
        forward["of_matrix_rate"] = forward["tflops"] / roof["matrix_tflops"]


def _each(shapes: Shapes) -> Iterator[Case]:
    for some in cases(shapes):
        yield from some()


def _line(name: str, timing: dict[str, Any]) -> str:
    ours, *rivals = timing.items()
    words = [
        f"{rival} {entry['p50_ms']:.3f} ({entry['times_ours']:.2f}×)"
        if "times_ours" in entry
        else f"{rival} failed"
        for rival, entry in rivals
    ]
    own = f"{ours[1]['p50_ms']:8.3f} ms" if "p50_ms" in ours[1] else "failed"
    return f"{name:58} {own}   {', '.join(words)}"


def main() -> int:
    """The command. Returns 1 when a check is red or there is no GPU."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output", type=Path, default=REPORT, metavar="FILE")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="nothing is begun later than a minute before"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no GPU"
        print(
            f"{built}: run `make gpu` on a machine with an NVIDIA GPU (Hopper for the 8-bit kernels), with a "
            "CUDA build of PyTorch and `pip install '.[gpu]'`",
            file=sys.stderr,
        )
        return 1
    seconds = 60 * (arguments.minutes - 1)
    report = run(Shapes("cuda", small=False), seconds, parts=tuple(arguments.only))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report))
    return not report["ok"]


if __name__ == "__main__":
    sys.exit(main())
