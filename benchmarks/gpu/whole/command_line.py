"""The command line, run as a user runs it: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence


class CommandFailed(RuntimeError):
    """A command ended with an exit code that is not 0; the message is the last line that it wrote."""


def conceptmaster(arguments: Sequence[str], seconds: float) -> float:
    """Runs ``conceptmaster ARGUMENTS``; the seconds that it took, Python's start included.

    Raises CommandFailed, also where it takes longer than `seconds`, or an hour.
    """
    seconds = min(seconds, 3600.0)
    start = time.perf_counter()
    command = [sys.executable, "-m", "conceptmaster", *arguments]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"conceptmaster {arguments[0]} took longer than {seconds:.0f} s") from None
    if done.returncode:
        raise CommandFailed(last_line(done.stdout) or f"exit code {done.returncode}")
    return time.perf_counter() - start


def last_line(written: bytes) -> str:
    """Of what a program wrote."""
    lines = written.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""
