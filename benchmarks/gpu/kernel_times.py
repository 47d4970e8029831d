"""The part `kernels`: all are checked, then those that are right are timed against their rivals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from . import check as checking
from . import setting as settings
from .case import Case, Shapes
from .cases import between_products, cases, cross_attention, eight_bit
from .setting import Setting
from .timing import failed, guarded, in_turn

CASE_SECONDS = 1.5
"""What the rounds of a kernel and its rivals may take, beside three that they always get."""
SHARE = 0.3
"""Of the time: what timing kernels may use up before the model's turn."""
MAIN = "1.3B 480p"
USES = ("residual and modulation", "norm and rotation", "text, padding", between_products.FAMILY)
USES_CONCEPTS = (*USES, "concept injection", "injection with its projection", cross_attention.FAMILY)
USES_HIGH = ("fp8 linear", eight_bit.FAMILY)
"""Kernels of the model, by the beginning of a case's name, or of what stands for cases that there are not."""


def check_all(setting: Setting) -> None:
    """Fills the report's "cases"."""
    shapes, report, say = setting.shapes, setting.report, setting.say
    rows: dict[str, Any] = report["cases"]
    if shapes.device == "cuda":
        checking.at_once(shapes, rows, say)
    if not any("shape" in row for row in rows.values()):  # also where no other process came up
        rows.clear()
        checking.here(shapes, rows, say)
    wrong = [name for name, row in rows.items() if not row["ok"]]
    report["ok"] &= not wrong
    say(f"{len(rows) - len(wrong)} of {len(rows)} kernel cases are right")
    if wrong:
        say(f"not timed, being red: {'; '.join(wrong)}")


def time_all(setting: Setting, spent: Callable[[], bool], compiled: bool = False) -> list[str]:
    """Adds "timing", or "compiled", to the rows that are right, the 1.3B model's first; the names of those
    that there was no time for."""
    missed: list[str] = []
    report, say, small = setting.report, setting.say, setting.shapes.small
    rows, key = report["cases"], "compiled" if compiled else "timing"
    for case in each(setting.shapes, only_main=compiled and not small):
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
        say(f"{case.name:58} {timing['failed']}" if "failed" in timing else line(case.name, timing))
    return missed


def measure(case: Case, compiled: bool = False) -> dict[str, Any]:
    """Milliseconds by name, "ours" first; the rivals' ratio to ours; our share of work and traffic.

    compiled: beside torch.compile's rivals instead of the others.
    """
    rivals = {"ours": case.ours, **(case.compiled if compiled else case.rivals)}
    timed = in_turn(rivals, settings.ROUNDS, seconds=CASE_SECONDS)
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


def each(shapes: Shapes, only_main: bool = False) -> Iterator[Case]:
    """All cases whose tensors there is memory for, those of the model's own size first."""
    for group in sorted(cases(shapes), key=lambda group: not group.size.startswith(MAIN)):
        if only_main and not group.size.startswith(MAIN):
            continue
        try:
            yield from group.make()
        except Exception as error:  # no memory for its tensors, above all
            failed(error)


def line(name: str, timing: dict[str, Any]) -> str:
    """A case's times, for people."""
    ours, *rivals = timing.items()
    words = [
        f"{rival} {entry['p50_ms']:.3f} ({entry['times_ours']:.2f}×)"
        if "times_ours" in entry
        else f"{rival} failed"
        for rival, entry in rivals
    ]
    own = f"{ours[1]['p50_ms']:8.3f} ms" if "p50_ms" in ours[1] else "failed"
    return f"{name:58} {own}   {', '.join(words)}"
