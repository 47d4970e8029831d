"""Checks every kernel on a GPU against float64, and only if all are right measures them against their rivals.

    python -m conceptmaster.benchmarks.gpu [--output FILE] [--minutes 9]     (`make gpu`)

Prints a table; the last line is JSON, also written to FILE: hardware, clocks, versions, commit, the card's
own matrix rate and copy bandwidth measured in the same run, and for every case its error and milliseconds
(p20, p50, p80) for us and each rival, timed in turn as replayed CUDA graphs, so that no launch overhead is
counted. What `torch.compile` takes to compile is not in them. Cases for which there was no time are named.
Nothing is timed while a check is red.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from conceptmaster.kernels.tolerances import TOLERANCES

from .alternating import machine
from .gpu_cases import Call, Case, Shapes, cases

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 30
MOST_ROWS = 1024
"""Tokens of a case that are held to float64, spread over all of them."""


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


def captured(call: Call) -> Call:
    """The call as a CUDA graph, to be replayed; on the CPU the call itself."""
    if not torch.cuda.is_available():
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def once(call: Call) -> float:
    """Milliseconds of one call: by CUDA's clock, or on the CPU by the wall's."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds by name, "ours" first: p20, p50, p80; the rivals' ratio to ours; our share of work and
    traffic.
    """
    rivals = {"ours": case.ours, **case.rivals, **(case.compiled if torch.cuda.is_available() else {})}
    ready = {name: captured(call) for name, call in rivals.items()}
    for call in ready.values():
        once(call)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(ROUNDS):
        for name, call in ready.items():
            times[name].append(once(call))
    found: dict[str, Any] = {name: percentiles(values) for name, values in times.items()}
    ours = found["ours"]["p50_ms"]
    for name in rivals:
        found[name]["times_ours"] = found[name]["p50_ms"] / ours
    found["ours"]["tflops"] = case.flops / ours / 1e9 or None
    found["ours"]["gb_per_s"] = case.moved_bytes / ours / 1e6 or None
    return found


def percentiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of milliseconds."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20_ms": fifths[0], "p50_ms": statistics.median(values), "p80_ms": fifths[-1]}


def roofline(shapes: Shapes) -> dict[str, Any]:
    """The card's own rates: a bfloat16 product of 8192 cubed in TFLOP/s, a copy of 1 GiB in GB/s."""
    side = 64 if shapes.small else 8192
    a, b = shapes.new(side, side), shapes.new(side, side)
    source = torch.empty(2**12 if shapes.small else 2**30, dtype=torch.uint8, device=shapes.device)
    target = torch.empty_like(source)
    product = percentiles([once(lambda: a @ b) for _ in range(ROUNDS)])["p50_ms"]
    copy = percentiles([once(lambda: target.copy_(source)) for _ in range(ROUNDS)])["p50_ms"]
    return {"matrix_tflops": 2 * side**3 / product / 1e9, "copy_gb_per_s": 2 * source.numel() / copy / 1e6}


def hardware() -> dict[str, Any]:
    """The card and its clocks, beside what `alternating.machine` tells."""
    found: dict[str, Any] = {"cuda": torch.version.cuda, **machine()}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,driver_version"
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found |= dict(zip(query.split(","), done.stdout.strip().split(", "), strict=False))
    return found


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" when something is changed; None outside one."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def run(shapes: Shapes, seconds: float, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Checks, then, if all is right, measurements; the report. Stops measuring after `seconds`."""
    start = time.perf_counter()
    rows: dict[str, dict[str, Any]] = {}
    for case in _each(shapes):
        row = {"shape": case.shape, "dtype": case.dtype, **check(case)}
        rows[case.name] = row
        say(f"{'right' if row['ok'] else 'WRONG'}  {case.name:58} relative L2 {row['relative_l2']:.1e}")
    ok = all(row["ok"] for row in rows.values())
    report: dict[str, Any] = {
        "ok": ok,
        "hardware": hardware(),
        "commit": commit(),
        "rounds": ROUNDS,
        "cases": rows,
    }
    if not ok:
        say("a check is red: nothing is timed")
        return report
    report["roofline"] = roofline(shapes)
    left: list[str] = []
    for case in _each(shapes):
        if time.perf_counter() - start > seconds:
            left.append(case.name)
            continue
        rows[case.name]["timing"] = timing = measure(case)
        say(_line(case.name, timing))
    report |= {"left_out": left, "seconds": time.perf_counter() - start}
    if left:
        say(f"no time was left for: {', '.join(left)}")
    return report


def _each(shapes: Shapes) -> Iterator[Case]:
    for some in cases(shapes):
        yield from some()


def _line(name: str, timing: dict[str, Any]) -> str:
    ours, *rivals = timing.items()
    against = ", ".join(
        f"{rival} {entry['p50_ms']:.3f} ({entry['times_ours']:.2f}×)" for rival, entry in rivals
    )
    return f"{name:58} {ours[1]['p50_ms']:8.3f} ms   {against}"


def main() -> int:
    """The command. Returns 1 when a check is red or there is no GPU."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "gpu.json", metavar="FILE")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="no case is begun later than a minute before"
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
    report = run(Shapes("cuda", small=False), 60 * (arguments.minutes - 1))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report))
    return not report["ok"]


if __name__ == "__main__":
    sys.exit(main())
