"""A question: ways to compute the same, each held to what is exact before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..job import Job
from ..timing import Call, failed, in_turn


class Missing(RuntimeError):
    """A way needs what this machine lacks: it is named, and nothing is wrong."""


@dataclass(frozen=True)
class Question:
    """answers: by name what builds the call, the one to compare with first; error: of what a call gives, its
    relative L2 error to what is exact; allowed: the largest that counts as right, for all or by name; flops:
    of one call, 0 where memory is the limit; seconds: without which it is not asked; graphs: whether calls
    are replayed as CUDA graphs."""

    name: str
    shape: dict[str, int]
    answers: Mapping[str, Callable[[], Call]]
    error: Callable[[Any], float]
    allowed: float | Mapping[str, float]
    flops: float = 0.0
    seconds: float = 5.0
    graphs: bool = True

    def allows(self, name: str) -> float:
        """The largest error that the answer `name` may have."""
        return self.allowed if isinstance(self.allowed, float) else self.allowed[name]


def ask(question: Question, job: Job) -> None:
    """Puts {"shape", "relative_l2", "timing"} into the job's `found`, under the question's name.

    What is missing or wrong is there with the reason, and is not timed. Raises DeviceLost.
    """
    found = job.found[question.name] = {"shape": question.shape, "relative_l2": {}, "timing": {}}
    timing: dict[str, Any] = {}
    calls: dict[str, Call] = {}
    for name, build in question.answers.items():
        try:
            call = build()
            error = found["relative_l2"][name] = question.error(call())
        except Missing as missing:
            timing[name] = {"missing": str(missing)}
            continue
        except Exception as raised:  # of a library, a compiler, a card that cannot: no common base
            timing[name] = failed(raised)
            continue
        if error <= question.allows(name):  # NaN is not
            calls[name] = call
        else:
            timing[name] = {"wrong": f"relative L2 {error:.1e}, {question.allows(name):.0e} is allowed"}
    with job.watch.during(found):
        timed = in_turn(calls, job.rounds, graphs=question.graphs, seconds=question.seconds / 2)
    found["timing"] = {name: (timing | timed)[name] for name in question.answers}
    first = next((entry["p50_ms"] for entry in timed.values() if "p50_ms" in entry), None)
    for name, entry in found["timing"].items():
        if "p50_ms" in entry:
            entry["tflops"] = question.flops / entry["p50_ms"] / 1e9 or None
            entry["gain"] = first / entry["p50_ms"]
        job.say(f"{question.name}: {name:32} {in_words(entry, found['relative_l2'].get(name))}")


def in_words(entry: dict[str, Any], error: float | None) -> str:
    """An answer's entry, for people."""
    for kind in ("missing", "failed", "wrong"):
        if kind in entry:
            return f"{kind}: {entry[kind]}"
    rate = f", {entry['tflops']:.0f} TFLOP/s" if entry["tflops"] else ""
    return f"{entry['p50_ms']:9.3f} ms  {entry['gain']:.2f}×{rate}, relative L2 {error:.1e}"
