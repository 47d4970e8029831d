"""The parts of `make gpu`, in the order of what is wanted most, and how a run goes through them.

Nothing is begun that the time is too short for, and what fails keeps nothing else from running. What was done
is in the report, so that a run that has ended early goes on where it was.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conceptmaster.errors import MissingDependency

from ..reports import commit
from . import forward, further, kernel_times, ladder, model, questions, setting, stages
from .card import Watch, hardware, no_fp8, roofline
from .case import Shapes
from .kernel_times import USES, USES_CONCEPTS, USES_HIGH
from .setting import Setting
from .timing import DeviceLost, Say, failed, guarded
from .whole import videos
from .whole.base import Base

SLACK = 1.0
"""Seconds within which no kernel is begun."""


@dataclass(frozen=True)
class Part:
    """A part of a run. seconds: that it takes on an H100, roughly; nothing is begun with less left, and
    longer ones look at the clock inside. uses: kernels that have to be right for it, by the beginning of
    their names, at sizes that begin with `size`."""

    run: Callable[[Setting], object]
    seconds: float
    uses: tuple[str, ...] = ()
    size: str = "1.3B"


def _kernels(s: Setting) -> None:
    if not s.report.get("checked"):
        s.report["at"] = "the checks of the kernels"
        kernel_times.check_all(s)
        s.report["checked"] = True
    share = kernel_times.SHARE if len(s.report["parts"]) > 1 else 1.0
    until = s.left() * (1 - share) + SLACK
    s.report["left_out"] += kernel_times.time_all(s, lambda: s.left() < until)


def _compiled(s: Setting) -> None:
    further.compiled_rivals(s.size, s.job("compiled", 2), s.shapes.mode)
    kernel_times.time_all(s, lambda: s.left() < 8, compiled=True)


def _sizes(s: Setting, more_concepts: bool) -> None:
    """A step at other numbers of concepts, or at other sizes."""
    sizes = further.scaling_sizes(s.shapes.small)
    rest = [x for x in sizes if dataclasses.replace(x, concepts=sizes[0].concepts) != sizes[0]]
    if more_concepts:
        least = PARTS["compiled"].seconds
        first = [x for x in sizes if x not in rest]
        further.scaling(first, s.job("scaling", 2), lambda done: 6 + (least if done > 2 else 0))
    else:
        further.scaling(rest, s.job("scaling", 2), lambda done: PARTS["scaling"].seconds)


def _high(s: Setting) -> bool:
    """Whether what is in 8 bits is part of the model's measurements."""
    return s.shapes.fp8 and not s.red(USES_HIGH)


def _whole_in_8_bits(s: Setting) -> None:
    if _high(s):
        videos.high(s.job("high"), Base(s.scratch, s.size))
    else:
        s.report["high"] = {"missing": no_fp8() or "a kernel of it is red"}


VIDEOS = ("whole", "sprites", "high", "ranks")
"""Parts that make whole videos."""
PARTS = {
    "whole": Part(lambda s: videos.whole(s.job("whole"), Base(s.scratch, s.size)), 90.0, USES_CONCEPTS),
    "sprites": Part(lambda s: videos.sprites(s.job("sprites"), s.scratch), 30.0, USES_CONCEPTS, "sprites"),
    "kernels": Part(_kernels, 10.0),
    "forward": Part(lambda s: forward.forward(s.size, s.job("forward"), _high(s)), 30.0, USES),
    "ladder": Part(lambda s: ladder.ladder(s.size, s.job("ladder", 3), _high(s)), 40.0, USES_CONCEPTS),
    "questions": Part(lambda s: questions.questions(s.job("questions", setting.ROUNDS)), 10.0),
    "high": Part(_whole_in_8_bits, 60.0, USES_CONCEPTS),
    "ranks": Part(lambda s: videos.ranks(s.job("ranks"), Base(s.scratch, s.size)), 60.0, USES_CONCEPTS),
    "concepts": Part(lambda s: _sizes(s, True), 12.0, USES_CONCEPTS),
    "compiled": Part(_compiled, 30.0, USES),
    "full": Part(lambda s: further.full(s.size, s.job("full")), 25.0, USES),
    "stages": Part(lambda s: stages.stages(s.size, s.job("stages")), 12.0),
    "scaling": Part(lambda s: _sizes(s, False), 12.0, USES_CONCEPTS),
    "profile": Part(lambda s: further.profiled(s.size, s.job("profile")), 10.0, USES_CONCEPTS),
}
"""By name, in their order."""


def run(
    shapes: Shapes,
    seconds: float,
    say: Say = print,
    parts: tuple[str, ...] = tuple(PARTS),
    report: dict[str, Any] | None = None,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Goes through the parts; the report. Begins nothing that `seconds` are too few for.

    scratch: a folder for a base of some 10 GB, which a run that goes on finds again; None for a temporary
    one. report: one to go on with, of a run that ended early; it is filled as this goes on. With "stopped" in
    it the GPU was lost on the way.
    """
    start = time.perf_counter()

    def left() -> float:
        return seconds - (time.perf_counter() - start)

    report = {} if report is None else report
    report.pop("stopped", None)
    for name, empty in {"ok": True, "done": [], "cases": {}}.items():
        report.setdefault(name, empty)
    report |= {"parts": list(parts), "left_out": []}
    try:
        with torch.no_grad(), Watch() as watch, tempfile.TemporaryDirectory() as temporary:
            _run(Setting(shapes, report, left, say, scratch or Path(temporary), watch), parts)
    except DeviceLost as lost:
        report["stopped"] = str(lost)
        report["ok"] = False
        say(f"the GPU is lost at {report.get('at')}: {lost}")
        return report
    finally:
        report["seconds"] = report.get("seconds", 0.0) + time.perf_counter() - start
    report.pop("at", None)
    if missed := report["left_out"]:
        say(f"no time was left for: {', '.join(missed)}")
    return report


def _run(s: Setting, parts: tuple[str, ...]) -> None:
    report, say, cuda = s.report, s.say, s.shapes.device == "cuda"
    if "hardware" not in report:
        report["hardware"] = hardware()
        report.setdefault("commit", commit())
        say(f"hardware: {json.dumps(report['hardware'])}")
        for remark in filter(None, (s.watch.missing, no_fp8())):
            say(remark)
    if "roofline" not in report:
        report["at"] = "the roofline"
        with s.watch.during(report, "roofline_clocks"):
            report["roofline"] = guarded(lambda: roofline(s.shapes.new, s.shapes.small, setting.ROUNDS))
        say(f"roofline: {json.dumps(report['roofline'])}")
    if cuda and "attention" not in report:
        report["at"] = "the lossless attention"
        report["attention"] = model.attention_that_is_right(say)
    for name, part in PARTS.items():
        if name in parts and name not in report["done"]:
            _begin(name, part, s)
    _conclude(report)


def _begin(name: str, part: Part, s: Setting) -> None:
    """Runs a part, or notes why not. Raises DeviceLost."""
    report, say = s.report, s.say
    if s.left() < part.seconds:
        report["left_out"].append(name)
        return
    report["at"] = name
    say(f"part {name}, {s.left():.0f} s are left")
    if red := s.red(part.uses, part.size):
        report.setdefault(name, {})["failed"] = f"not run, a kernel of it is red: {', '.join(red)}"
        say(f"{name}: {report[name]['failed']}")
        report["done"].append(name)
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for processes of their own
    try:
        part.run(s)
    except DeviceLost as lost:
        if name != "kernels":  # which goes on with the next case
            report.setdefault(name, {})["failed"] = f"the GPU was lost: {lost}"
            report["done"].append(name)
        raise
    except MissingDependency as error:  # nothing is wrong
        report.setdefault(name, {})["missing"] = str(error)
        say(f"{name}: missing: {error}")
    except Exception as error:  # whatever it is, the other parts are not to suffer from it
        report.setdefault(name, {})["failed"] = reason = failed(error)["failed"]
        say(f"{name} FAILED: {reason}")
    if name != "kernels" or not report["left_out"]:
        report["done"].append(name)
    gc.collect()
    _conclude(report)


def _conclude(report: dict[str, Any]) -> None:
    forward, roof = report.get("forward", {}), report["roofline"]
    if forward.get("lossless") is False or report.get("ladder", {}).get("ok") is False:
        report["ok"] = False
    if any("failed" in report.get(name, {}) for name in PARTS):
        report["ok"] = False
    made = [entry for name in VIDEOS for entry in report.get(name, {}).values() if isinstance(entry, dict)]
    if any("wrong" in entry for entry in made):
        report["ok"] = False
    ours = forward.get("timing", {}).get("ours", {}).get("p50_ms")
    if ours and "matrix_tflops" in roof:
        forward["tflops"] = forward["flops"] / ours / 1e9
        forward["of_matrix_rate"] = forward["tflops"] / roof["matrix_tflops"]
