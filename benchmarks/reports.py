"""What every report of a measurement says of the machine and the sources, and how it is written."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conceptmaster.atomic_write import replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def percentiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of milliseconds."""
    if len(values) < 2:
        return {"p20_ms": values[0], "p50_ms": values[0], "p80_ms": values[0]}
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20_ms": fifths[0], "p50_ms": statistics.median(values), "p80_ms": fifths[-1]}


def machine(packages: Iterable[str] = ("numpy", "onnxruntime", "openvino", "torch")) -> dict[str, Any]:
    """Processor, cores, load and the versions of Python and of those packages that are there."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" when something is changed; None outside one."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def write(report: dict[str, Any], path: Path) -> None:
    """The report as JSON, in one move: a reader, or one who is stopped here, finds a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
