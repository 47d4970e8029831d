"""The card: what it is, how fast it is by itself, and its clocks and watts while something runs."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch

from conceptmaster.kernels.fp8_linear import why_no_fp8

from ..reports import machine, percentiles
from .timing import once

PACKAGES = ("numpy", "onnxruntime", "torch", "triton", "transformers", "diffusers", "nvidia-cudnn-frontend")
PERIOD = 0.4
"""Seconds between two readings of the clocks."""
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
REASONS = "clocks_event_reasons.active"
HELD_BACK = {
    0x02: "application clocks",
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
"""NVML's reasons why clocks are lower than they could be, by bit."""


def no_fp8() -> str | None:
    """Why what is in 8 bits is left out on this card, in one line; None where it is not, and on a CPU."""
    reason = why_no_fp8(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    return None if reason is None else f"what is in 8 bits is left out: {reason}"


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
    """The card and its clocks, beside what `reports.machine` tells."""
    found: dict[str, Any] = {"cuda": torch.version.cuda, **machine(PACKAGES)}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        names = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "driver_version")
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found |= dict(zip(names, _query(names), strict=True))
    return found


class Watch:
    """Reads the card's clocks and watts with nvidia-smi, in a thread, between entering and leaving it.

    always: all that time; else only `during` something, so that nothing else is disturbed. missing: why there
    are none, in one line; None where there are.
    """

    def __init__(self, always: bool = False) -> None:
        self.missing: str | None = None
        self._wanted = int(always)
        self._names: tuple[str, ...] = (*CLOCKS, REASONS)
        self._readings: list[tuple[float, list[float | None]]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._read, name="clocks", daemon=True)

    def __enter__(self) -> Self:
        if not torch.cuda.is_available():
            self.missing = "no clocks and watts: there is no GPU"
            return self
        for names in (self._names, CLOCKS):  # older drivers call the reasons otherwise
            try:
                _query(names)
            except (OSError, subprocess.SubprocessError) as error:
                self.missing = f"no clocks and watts: nvidia-smi does not tell ({type(error).__name__})"
                continue
            self.missing, self._names = None, names
            self._thread.start()
            break
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    @contextlib.contextmanager
    def during(self, found: dict[str, Any], name: str = "clocks") -> Iterator[None]:
        """Puts what is read while the block runs into `found`, also where the block fails."""
        start = time.perf_counter()
        self._wanted += 1
        try:
            yield
        finally:
            self._wanted -= 1
            found[name] = self.between(start, time.perf_counter())

    def between(self, start: float, end: float) -> dict[str, Any]:
        """Smallest, middle and largest SM clock in MHz and watts, between two times of `time.perf_counter`;
        the memory's clock, the highest temperature, and in which part of the readings what held clocks
        back."""
        rows = [values for at, values in list(self._readings) if start <= at <= end]
        if not rows:
            return {"missing": self.missing or "too short to be read"}
        columns = dict(zip(self._names, zip(*rows, strict=True), strict=True))
        found: dict[str, Any] = {"readings": len(rows)}
        for key, name in (("sm_mhz", "clocks.sm"), ("watts", "power.draw")):
            if values := sorted(value for value in columns[name] if value is not None):
                found[key] = [values[0], statistics.median(values), values[-1]]
        for key, name in (("memory_mhz", "clocks.mem"), ("celsius", "temperature.gpu")):
            found[key] = max((value for value in columns[name] if value is not None), default=None)
        reasons = [int(value) for value in columns.get(REASONS, ()) if value is not None]
        for bit, name in HELD_BACK.items() if reasons else ():
            if share := sum(bool(value & bit) for value in reasons) / len(reasons):
                found.setdefault("held_back", {})[name] = round(share, 2)
        return found

    def _read(self) -> None:
        while not self._end.wait(PERIOD):
            if not self._wanted:
                continue
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                values = [_number(value) for value in _query(self._names)]
                self._readings.append((time.perf_counter(), values))


def clocks_in_words(found: dict[str, Any]) -> str:
    """What `Watch.between` gave, in a few words."""
    if "sm_mhz" not in found:
        return str(found.get("missing", "no clocks"))
    words = [f"{found['sm_mhz'][1]:.0f} MHz ({found['sm_mhz'][0]:.0f} to {found['sm_mhz'][2]:.0f})"]
    words += [f"{found['watts'][1]:.0f} W"] if "watts" in found else []
    words += [f"{name} {share:.0%} of the time" for name, share in found.get("held_back", {}).items()]
    return ", ".join(words)


def _query(names: tuple[str, ...]) -> list[str]:
    """The first GPU's values, as nvidia-smi writes them. Raises OSError, SubprocessError."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    values = done.stdout.strip().split(", ")
    if len(values) != len(names):
        raise subprocess.SubprocessError(f"nvidia-smi wrote {done.stdout!r:.80}")
    return values


def _number(text: str) -> float | None:
    """A value without its unit; None where there is none."""
    try:
        number = text.split()[0]
        return float(int(number, 16)) if number.startswith("0x") else float(number)
    except (IndexError, ValueError):
        return None
