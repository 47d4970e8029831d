"""Rivals timed turn by turn in one run, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .reports import machine, percentiles


def alternate(
    benchmark: Any, rivals: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Times every rival `rounds` times in turn; seconds by name.

    The last one is what pytest-benchmark reports, the others run in the setup of its rounds. `extra_info`
    gets every rival's median and its 20th and 80th percentile in milliseconds, the ratio of the first one's
    median to each, and what it was measured on.
    """
    *others, last = rivals
    seconds: dict[str, list[float]] = {name: [] for name in rivals}

    def run(name: str) -> None:
        start = time.perf_counter()
        rivals[name]()
        seconds[name].append(time.perf_counter() - start)

    def before_each() -> None:
        for name in others:
            run(name)

    benchmark.pedantic(run, args=(last,), setup=before_each, rounds=rounds, warmup_rounds=warmup)
    measured = {name: times[-rounds:] for name, times in seconds.items()}
    benchmark.extra_info.update(_summary(measured), machine=machine())
    return measured


def report(measured: Mapping[str, list[float]], title: str) -> str:
    """A table for people: medians, percentiles and how often faster than the first."""
    lines = [f"\n{title}, {len(next(iter(measured.values())))} rounds in turn"]
    for name, entry in _summary(measured)["rivals"].items():
        lines.append(
            f"  {name:24} {entry['p50_ms']:9.2f} ms  "
            f"(p20 {entry['p20_ms']:.2f}, p80 {entry['p80_ms']:.2f})  {entry['ratio']:.2f}×"
        )
    return "\n".join(lines)


def _summary(measured: Mapping[str, list[float]]) -> dict[str, Any]:
    rivals = {name: percentiles([1e3 * time for time in times]) for name, times in measured.items()}
    first = next(iter(rivals.values()))["p50_ms"]
    return {"rivals": {name: entry | {"ratio": first / entry["p50_ms"]} for name, entry in rivals.items()}}
