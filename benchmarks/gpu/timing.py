"""How calls are timed on a GPU: rivals in turn, replayed as CUDA graphs, by CUDA's own clock.

A call that fails fails alone, as long as the GPU still answers: see `failed`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from conceptmaster.runtime.backends.pytorch.stepper import cuda_graphs

from ..reports import percentiles

Call = Callable[[], Any]
Say = Callable[[str], object]

MIN_ROUNDS = 3
"""So many even where the seconds are used up."""


class DeviceLost(RuntimeError):
    """The GPU answers no more in this process, as after an illegal memory access."""


def failed(error: Exception) -> dict[str, Any]:
    """{"failed": why}. Raises DeviceLost when nothing further can be computed in this process."""
    if isinstance(error, DeviceLost):
        raise error
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception as lost:  # what CUDA's errors are called differs from version to version
            raise DeviceLost(why(error)) from lost
    return {"failed": why(error)}


def guarded(call: Callable[[], dict[str, Any]], **otherwise: Any) -> dict[str, Any]:
    """What the call gives, or `otherwise` beside why it gives nothing. Raises DeviceLost."""
    try:
        return call()
    except Exception as error:  # of kernels, compilers and rivals: no common base
        return otherwise | failed(error)


def captured(call: Call) -> Call:
    """The call as a CUDA graph, to be replayed; on the CPU the call itself."""
    return cuda_graphs()(call) if torch.cuda.is_available() else call


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


def in_turn(
    calls: Mapping[str, Call], rounds: int, graphs: bool = True, seconds: float = math.inf
) -> dict[str, dict[str, Any]]:
    """p20, p50 and p80 milliseconds by name, after one call each that is not counted, and "rounds".

    graphs: replay each call as a CUDA graph; where that cannot be captured it is launched as it is, and its
    entry has "not_captured". A call that fails is not timed: its entry is {"failed": why}. seconds: of all
    rounds together; then it ends early. Raises DeviceLost.
    """
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Call] = {}
    notes: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        try:
            ready[name], notes[name] = _replayable(call) if graphs else (call, {})
            once(ready[name])
        except Exception as error:  # what a rival or its compiler raises has no common base
            found[name] = failed(error)
            ready.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in ready}
    start, done = time.perf_counter(), 0
    while ready and done < rounds:
        if done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, call in list(ready.items()):
            try:
                times[name].append(once(call))
            except Exception as error:  # out of memory, say
                found[name] = failed(error)
                del ready[name], times[name]
        done += 1
    timed = {name: percentiles(values) | notes[name] for name, values in times.items()}
    return found | {name: {**entry, "rounds": done} for name, entry in timed.items()}


def _replayable(call: Call) -> tuple[Call, dict[str, Any]]:
    """The call captured, or as it is beside the reason."""
    try:
        return captured(call), {}
    except Exception as error:  # what a capture raises has no common base
        return call, {"not_captured": failed(error)["failed"]}


def why(error: Exception) -> str:
    """An error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
