"""Checks every kernel and the model on a GPU, and measures against their rivals those that are right.

    python -m conceptmaster.benchmarks.gpu [--output FILE] [--minutes 9] [--only PART …]     (`make gpu`)

Parts, in the order of what is wanted most: `kernels` (each against float64, then against its rivals),
`forward` (Wan2.1 1.3B, 832x480x81, against diffusers), `ladder` (a step with 4 concepts, from plain PyTorch
up), `video` (the shipped model, from request to mp4), `concepts` (a step at 0 to 4 of them), `compiled`
(torch.compile's rivals), `full` (the forward's error at full size), `stages`, `scaling` (frames, pixels,
14B), `cpu` (the shipped model by ONNX Runtime), `profile`. Prints a table; the last line is JSON, also
written to FILE, and again after every line that is printed: hardware, clocks, versions, commit, the card's
own matrix rate and copy bandwidth measured in the same run, and for every case its shape, its error and
milliseconds (p20, p50, p80) of ours and of each rival, timed in turn. What `torch.compile` takes to compile
is in none of them. What there was no time for is named. What is not right is not timed, and nothing that
fails keeps the rest from running; where the GPU itself is lost, a new process goes on.
`python -m conceptmaster.benchmarks.gpu.plot FILE` draws it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..reports import RESULTS, commit, write
from . import check as checking
from . import further, model, video
from .cases import COMPILE_MODE, Case, Shapes
from .check import check
from .timing import DeviceLost, Job, Say, failed, guarded, hardware, in_turn, roofline

__all__ = ["check", "in_turn", "run"]

REPORT = RESULTS / "gpu.json"
ROUNDS = 30
MODEL_ROUNDS = 4
CASE_SECONDS = 1.5
"""What the rounds of a kernel and its rivals may take, beside three that they always get."""
SECONDS = {
    "kernels": 0.0,
    "forward": 30.0,
    "ladder": 40.0,
    "video": 30.0,
    "concepts": 12.0,
    "compiled": 30.0,
    "full": 25.0,
    "stages": 12.0,
    "scaling": 12.0,
    "cpu": 20.0,
    "profile": 10.0,
}
"""Of each part on an H100, roughly; nothing is begun with less left. Longer ones look at the clock inside."""
PARTS = tuple(SECONDS)
KERNELS_SHARE = 0.3
"""Of the time: what timing kernels may use up before the model's turn."""
USES = ("residual and modulation", "norm and rotation", "row_cases")
USES_CONCEPTS = (*USES, "concept injection", "injection with its projection", "cross_cases")
USES_HIGH = ("fp8 linear", "eight_bit_cases")
"""Kernels of the model, by the beginning of a case's name, or of what stands for cases that there are not."""


def measure(case: Case, compiled: bool = False) -> dict[str, Any]:
    """Milliseconds by name, "ours" first; the rivals' ratio to ours; our share of work and traffic.

    compiled: beside torch.compile's rivals instead of the others.
    """
    rivals = {"ours": case.ours, **(case.compiled if compiled else case.rivals)}
    timed = in_turn(rivals, ROUNDS, seconds=CASE_SECONDS)
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
    say: Say = print,
    parts: tuple[str, ...] = PARTS,
    report: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Checks, then measurements of what is right; the report. Begins nothing that `seconds` are too few for.

    report: one to go on with, of a run that ended early; it is filled as this goes on. With "stopped" in it
    the GPU was lost on the way.
    """
    start = time.perf_counter()

    def left() -> float:
        return seconds - (time.perf_counter() - start)

    report = {} if report is None else report
    report.pop("stopped", None)
    report.setdefault("ok", True)
    try:
        with torch.no_grad():
            _run(shapes, left, say, parts, report)
    except DeviceLost as lost:
        report["stopped"] = str(lost)
        report["ok"] = False
        say(f"the GPU is lost at {report.get('at')}: {lost}")
        return report
    finally:
        report["seconds"] = report.get("seconds", 0.0) + time.perf_counter() - start
    report.pop("at", None)
    if missed := report.get("left_out"):
        say(f"no time was left for: {', '.join(missed)}")
    return report


def _run(
    shapes: Shapes, left: Callable[[], float], say: Say, parts: tuple[str, ...], report: dict[str, Any]
) -> None:
    report["parts"] = list(parts)
    report.setdefault("done", [])
    rows: dict[str, Any] = report.setdefault("cases", {})

    if "hardware" not in report:
        report["hardware"] = hardware()
        report.setdefault("commit", commit())
        say(f"hardware: {json.dumps(report['hardware'])}")
    if "kernels" in parts and "kernels" not in report["done"]:
        report["at"] = "the checks of the kernels"
        if shapes.device == "cuda":
            checking.at_once(shapes.device, shapes.small, rows, say)
        if not any("shape" in row for row in rows.values()):  # also where no other process came up
            rows.clear()
            checking.here(shapes, rows, say)
        report["ok"] &= all(row["ok"] for row in rows.values())
        wrong = [name for name, row in rows.items() if not row["ok"]]
        say(f"{len(rows) - len(wrong)} of {len(rows)} kernel cases are right")
        if wrong:
            say(f"not timed, being red: {'; '.join(wrong)}")
    if shapes.device == "cuda":
        gc.collect()
        gc.freeze()  # some versions of PyTorch collect before every capture
    if "roofline" not in report:
        report["at"] = "the roofline"
        report["roofline"] = guarded(lambda: roofline(shapes.new, shapes.small, ROUNDS))
        say(f"roofline: {json.dumps(report['roofline'])}")
    if shapes.device == "cuda" and "attention" not in report:
        report["at"] = "the lossless attention"
        report["attention"] = model.attention_that_is_right(say)
    if "kernels" in parts and "kernels" not in report["done"]:
        share = KERNELS_SHARE if len(parts) > 1 else 1.0
        until = left() * (1 - share) + _SLACK
        report["left_out"] = _time_kernels(shapes, report, lambda: left() < until, say)
        report["done"].append("kernels")
    _model_parts(shapes, report, parts, left, say)


_SLACK = 1.0
"""Seconds within which no kernel is begun."""


def _time_kernels(
    shapes: Shapes, report: dict[str, Any], spent: Callable[[], bool], say: Say, compiled: bool = False
) -> list[str]:
    """Adds "timing", or "compiled", to the rows that are right, the 1.3B model's first; the names of those
    that there was no time for."""
    missed: list[str] = []
    rows, key = report["cases"], "compiled" if compiled else "timing"
    for case in _each(shapes, only_main=compiled and not shapes.small):
        row = rows.get(case.name, {"ok": False})
        if not row["ok"] or key in row or (compiled and not case.compiled):
            continue
        if spent():
            missed.append(case.name)
            continue
        report["at"] = row["at"] = case.name
        row[key] = {"ours": {"failed": "the GPU was lost"}}
        row[key] = timing = guarded(functools.partial(measure, case, compiled))
        del row["at"]
        say(f"{case.name:58} {timing['failed']}" if "failed" in timing else _line(case.name, timing))
    return missed


def _each(shapes: Shapes, only_main: bool = False) -> Iterator[Case]:
    """All cases whose tensors there is memory for, those of the model's own size first."""
    made = sorted(checking.groups(shapes), key=lambda group: MAIN not in group[0])
    for name, group in made:
        if only_main and MAIN not in name:
            continue
        try:
            yield from group()
        except Exception as error:  # no memory for its tensors, above all
            failed(error)


MAIN = "1.3B 480p"


def _red(report: dict[str, Any], kernels: tuple[str, ...], shape: str = "1.3B") -> list[str]:
    """Which of these kernels are red at the shapes that count; where nothing was checked, none."""
    return [
        name
        for name, row in report.get("cases", {}).items()
        if not row["ok"] and name.startswith(kernels) and (f", {shape}" in name or name.endswith(", small"))
    ]


def _model_parts(
    shapes: Shapes, report: dict[str, Any], parts: tuple[str, ...], left: Callable[[], float], say: Say
) -> None:
    """Adds the parts that are of the whole model to the report, as long as there is time."""
    size = model.SMALL if shapes.small else model.Size()
    high = not _red(report, USES_HIGH)
    if not high:
        say("the tier high is left out of the model: a kernel of it is red")
    steps = 2 if shapes.small else None
    sizes = further.scaling_sizes(shapes.small)
    others = [s for s in sizes if dataclasses.replace(s, concepts=sizes[0].concepts) != sizes[0]]

    def job(name: str, rounds: int = MODEL_ROUNDS) -> Job:
        return Job(shapes.device, min(ROUNDS, rounds), say, report.setdefault(name, {}), left)

    def compiled() -> None:
        further.compiled_rivals(size, job("compiled", 2), shapes.mode)
        _time_kernels(shapes, report, lambda: left() < 8, say, compiled=True)

    def concepts() -> None:
        further.scaling(
            [s for s in sizes if s not in others],
            job("scaling", 2),
            lambda done: 6 + (SECONDS["compiled"] if done > 2 else 0),
        )

    todo: dict[str, tuple[tuple[str, ...], Callable[[], object]]] = {
        "forward": (USES, lambda: model.forward(size, job("forward"), high)),
        "ladder": (USES_CONCEPTS, lambda: model.ladder(size, job("ladder", 3), high)),
        "video": (USES_CONCEPTS, lambda: video.shipped(job("video", 10), ["torch"], steps)),
        "concepts": (USES_CONCEPTS, concepts),
        "compiled": (USES, compiled),
        "full": (USES, lambda: further.full(size, job("full"))),
        "stages": ((), lambda: video.stages(size, job("stages"))),
        "scaling": (
            USES_CONCEPTS,
            lambda: further.scaling(others, job("scaling", 2), lambda done: SECONDS["scaling"]),
        ),
        "cpu": ((), lambda: video.shipped(job("video", 2), ["onnxruntime"], steps)),
        "profile": (USES_CONCEPTS, lambda: further.profiled(size, job("profile"))),
    }
    for name, (kernels, measured) in todo.items():
        if name not in parts or name in report["done"]:
            continue
        if left() < SECONDS[name]:
            report.setdefault("left_out", []).append(name)
            continue
        report["at"] = name
        report["done"].append(name)
        say(f"part {name}, {left():.0f} s are left")
        if red := _red(report, kernels, "sprites" if name == "video" else "1.3B"):
            report.setdefault(name, {})["failed"] = f"not run, a kernel of it is red: {', '.join(red)}"
            say(f"{name}: {report[name]['failed']}")
            continue
        try:
            measured()
        except DeviceLost as lost:
            report.setdefault(name, {})["failed"] = f"the GPU was lost: {lost}"
            raise
        except Exception as error:  # whatever it is, the other parts are not to suffer from it
            report.setdefault(name, {})["failed"] = reason = failed(error)["failed"]
            say(f"{name} FAILED: {reason}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _conclude(report)
    _conclude(report)


def _conclude(report: dict[str, Any]) -> None:
    forward, roof = report.get("forward", {}), report["roofline"]
    if forward.get("lossless") is False or report.get("ladder", {}).get("ok") is False:
        report["ok"] = False
    if any("failed" in report.get(name, {}) for name in PARTS):
        report["ok"] = False
    ours = forward.get("timing", {}).get("ours", {}).get("p50_ms")
    if ours and "matrix_tflops" in roof:
        forward["tflops"] = forward["flops"] / ours / 1e9
        forward["of_matrix_rate"] = forward["tflops"] / roof["matrix_tflops"]


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
    """The command. Returns 1 when a check is red, something failed, or there is no GPU."""
    start = time.monotonic()
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output", type=Path, default=REPORT, metavar="FILE")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="nothing is begun that is not thought to end within them"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument(
        "--compile-mode", default=COMPILE_MODE, metavar="MODE", help="of torch.compile, e.g. "
        "max-autotune-no-cudagraphs, which takes minutes; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--commit", help="of a copy that has no history beside it")
    parser.add_argument("--resume", action="store_true", help="go on with FILE, of a run that ended early")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no GPU"
        print(
            f"{built}: run `make gpu` on a machine with an NVIDIA GPU (Hopper for the 8-bit kernels), with a "
            "CUDA build of PyTorch and `pip install '.[gpu]'`",
            file=sys.stderr,
        )
        return 1
    report: dict[str, Any] = {"rounds": ROUNDS}
    if arguments.resume:
        report = json.loads(arguments.output.read_text("utf-8"))
    if arguments.commit:
        report["commit"] = arguments.commit

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {text}", flush=True)
        write(report, arguments.output)

    seconds = 60 * arguments.minutes
    shapes = Shapes("cuda", small=False, mode=arguments.compile_mode)
    run(shapes, seconds, say, tuple(arguments.only), report)
    write(report, arguments.output)
    if "stopped" in report and not report.get("resumed", 0) > 2:
        _in_a_new_process(arguments, report, seconds - (time.monotonic() - start))
    print(json.dumps(report), flush=True)
    return not report["ok"]


def _in_a_new_process(arguments: argparse.Namespace, report: dict[str, Any], seconds: float) -> NoReturn:
    """Goes on where the GPU was lost, in this one's place. What was running then counts as failed."""
    report["resumed"] = report.get("resumed", 0) + 1
    write(report, arguments.output)
    command = [sys.executable, "-m", "conceptmaster.benchmarks.gpu", "--resume"]
    command += ["--output", str(arguments.output), "--minutes", str(seconds / 60)]
    command += ["--compile-mode", arguments.compile_mode, "--only", *arguments.only]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(main())
