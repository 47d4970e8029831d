"""Command-line arguments that several of the world's commands share."""

from __future__ import annotations

import argparse
import os
import re


def seed_range(text: str) -> range:
    """``"A:B"`` as the seeds A to B - 1; whether A < B is checked with the options that they become.

    For argparse's ``type``: raises ArgumentTypeError for anything else.
    """
    found = re.fullmatch(r"(\d{1,20}):(\d{1,20})", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be two numbers A:B with A < B, not {text!r}")
    return range(int(found[1]), int(found[2]))


def cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # fewer than there are in a container, and unknown to macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def add_running(parser: argparse.ArgumentParser) -> None:
    """--device, --workers and --quiet, for commands that score many videos."""
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
    parser.add_argument(
        "--workers", type=int, default=cores(), metavar="W", help="processes, of one thread each (cores)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
