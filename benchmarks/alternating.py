"""Rivals timed turn by turn in one run, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from .reports import machine, percentiles

Measured = dict[str, dict[str, float]]
"""Of every rival its median and its 20th and 80th percentile by the clock, p20_ms, p50_ms and p80_ms; ratio,
of the first one's median to its; cpu_p50_ms and cpu_ratio, the same of the time that this process computed,
which other processes hardly touch."""


def alternate(
    benchmark: Any, rivals: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> Measured:
    """Times every rival `rounds` times in turn.

    The last one is what pytest-benchmark reports, the others run in the setup of its rounds. `extra_info`
    gets what is returned, and what it was measured on.
    """
    *others, last = rivals
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    computed: dict[str, list[float]] = {name: [] for name in rivals}

    def run(name: str) -> None:
        start, before = time.perf_counter(), time.process_time()
        rivals[name]()
        computed[name].append(time.process_time() - before)
        seconds[name].append(time.perf_counter() - start)

    def before_each() -> None:
        for name in others:
            run(name)

    benchmark.pedantic(run, args=(last,), setup=before_each, rounds=rounds, warmup_rounds=warmup)
    measured = {
        name: percentiles([1e3 * found for found in seconds[name][-rounds:]])
        | {"cpu_p50_ms": 1e3 * statistics.median(computed[name][-rounds:])}
        for name in rivals
    }
    first = next(iter(measured.values()))
    for entry in measured.values():
        entry["ratio"] = first["p50_ms"] / entry["p50_ms"]
        entry["cpu_ratio"] = first["cpu_p50_ms"] / entry["cpu_p50_ms"] if entry["cpu_p50_ms"] else 0.0
    benchmark.extra_info.update(rivals=measured, machine=machine(), rounds=rounds)
    return measured


def report(measured: Measured, title: str) -> str:
    """A table for people: medians, percentiles and how often faster than the first."""
    lines = [f"\n{title}, in turn"]
    for name, entry in measured.items():
        lines.append(
            f"  {name:34} {entry['p50_ms']:9.2f} ms  (p20 {entry['p20_ms']:.2f}, p80 {entry['p80_ms']:.2f})  "
            f"{entry['ratio']:.2f}×; computing {entry['cpu_p50_ms']:.2f} ms, {entry['cpu_ratio']:.2f}×"
        )
    return "\n".join(lines)
