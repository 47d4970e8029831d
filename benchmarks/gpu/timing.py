"""How calls are timed on a GPU: rivals in turn, replayed as CUDA graphs, by CUDA's own clock.

A call that fails fails alone, as long as the GPU still answers: see `failed`.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from conceptmaster.runtime.backends.pytorch.stepper import cuda_graphs

from ..reports import machine, percentiles

Call = Callable[[], Any]
Say = Callable[[str], object]

MIN_ROUNDS = 3
"""So many even where the seconds are used up."""
PACKAGES = ("numpy", "onnxruntime", "torch", "triton", "transformers", "diffusers")


@dataclass
class Job:
    """What every measurement is given. device: "cuda" or "cpu"; rounds: of what is timed; say: takes a line
    for people; found: is filled as it goes, so that what comes before a failure is kept; left: how many
    seconds there are still."""

    device: str
    rounds: int
    say: Say = print
    found: dict[str, Any] = field(default_factory=dict)
    left: Callable[[], float] = lambda: math.inf


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


def roofline(new: Callable[..., torch.Tensor], small: bool, rounds: int) -> dict[str, Any]:
    """The card's own rates: a bfloat16 product of 8192 cubed in TFLOP/s, a copy of 1 GiB in GB/s."""
    side = 64 if small else 8192
    a, b = new(side, side), new(side, side)
    source = torch.empty(2**12 if small else 2**30, dtype=torch.uint8, device=a.device)
    target = torch.empty_like(source)
    product = percentiles([once(lambda: a @ b) for _ in range(rounds)])["p50_ms"]
    copy = percentiles([once(lambda: target.copy_(source)) for _ in range(rounds)])["p50_ms"]
    return {"matrix_tflops": 2 * side**3 / product / 1e9, "copy_gb_per_s": 2 * source.numel() / copy / 1e6}


def hardware() -> dict[str, Any]:
    """The card and its clocks, beside what `alternating.machine` tells."""
    found: dict[str, Any] = {"cuda": torch.version.cuda, **machine(PACKAGES)}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,driver_version"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
            found |= dict(zip(query.split(","), done.stdout.strip().split(", "), strict=False))
    return found
