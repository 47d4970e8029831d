"""How many CPUs this process may use, and how many threads one may ask for."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ..errors import InputError

CGROUPS = Path("/sys/fs/cgroup")
LEAST_LIMIT = 64  # threads that one may ask for on the smallest machine


def usable(cgroups: Path = CGROUPS) -> int:
    """CPUs that this process may use, 1 or more: those it is bound to, or fewer where its container's share
    of time is less (Linux' control groups, rounded up)."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13, which also heeds PYTHON_CPU_COUNT
        bound = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):  # unknown to macOS
        bound = len(os.sched_getaffinity(0))
    else:
        bound = os.cpu_count() or 1
    share = _share(cgroups)
    return bound if share is None else max(1, min(bound, math.ceil(share)))


def check_threads(threads: object) -> int:
    """Returns `threads`. Raises InputError unless it is an integer, 1 to four for each of the machine's CPUs
    (to 64 on a small one): each session starts so many."""
    most = max(LEAST_LIMIT, 4 * (os.cpu_count() or 1))
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most:
        raise InputError(f"threads must be a positive integer, {most} at most here, not {threads!r:.60}")
    return threads


def _share(cgroups: Path) -> float | None:
    """CPUs that the container may keep busy, None where nothing limits them."""
    try:
        quota, period = (cgroups / "cpu.max").read_text("ascii").split()  # version 2
    except (OSError, ValueError):
        try:
            quota, period = ((cgroups / f"cpu/cpu.cfs_{name}_us").read_text("ascii") for name in _VERSION_1)
        except (OSError, ValueError):
            return None
    try:
        share = int(quota) / int(period)  # "max" or -1: no limit
    except (ValueError, ZeroDivisionError):
        return None
    return share if share > 0 else None


_VERSION_1 = ("quota", "period")
