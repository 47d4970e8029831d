"""Command-line arguments that several of the world's commands share."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

from conceptmaster.errors import InputError


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


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raises InputError for the first of the named arguments that is given and less than 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def check_shares(args: argparse.Namespace, *names: str) -> None:
    """Raises InputError for the first of the named arguments that is not a share, 0 to 1."""
    for name in names:
        if not 0 <= (share := getattr(args, name)) <= 1:
            raise InputError(f"--{name} must lie between 0 and 1, got {share}")


def guidance_of(weights: Path, asked: float | None) -> float:
    """The guidance asked for, or the one that a weights folder's model is sampled with."""
    if asked is not None:
        return asked
    return float(json.loads((weights / "defaults.json").read_text())["guidance"])


def check_trained(weights: Path, data: Path) -> None:
    """Raises InputError for what a weights folder or the folder of ``train --output`` lacks."""
    names = ("model.safetensors", "vae.safetensors", "defaults.json")
    for path in (*(weights / name for name in names), data / "clips"):
        if not path.exists():
            raise InputError(f"{path} is missing: `train --output` makes it")
