"""Command-line arguments that several of the world's commands share, and options made of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from conceptmaster.errors import InputError

Options = TypeVar("Options")


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


def add_seeds(parser: argparse.ArgumentParser, seeds: range | None, help: str) -> None:
    """--seeds, A to B - 1; None: not given."""
    parser.add_argument("--seeds", type=seed_range, default=seeds, metavar="A:B", help=help)


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """--bundle."""
    parser.add_argument(
        "--bundle", default="sprites", metavar="NAME", help="shipped bundle or a path (sprites)"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """--steps, --solver and --guidance, for commands that sample in one way."""
    parser.add_argument("--steps", type=int, metavar="N", help="model evaluations (the bundle's default)")
    parser.add_argument("--solver", metavar="NAME", help="euler or unipc (the bundle's default)")
    parser.add_argument("--guidance", type=float, metavar="G", help="(the bundle's default)")


def add_running(parser: argparse.ArgumentParser, workers: int | None = None) -> None:
    """--device, --workers (None: one a core) and --quiet, for commands that score many videos."""
    default = cores() if workers is None else workers
    shown = "cores" if workers is None else workers
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
    parser.add_argument(
        "--workers", type=int, default=default, metavar="W", help=f"processes, of one thread each ({shown})"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_training(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    """--seed (unless not), --device and --threads, for commands that train."""
    import torch

    if seed:
        parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (one per core)")


def set_threads(args: argparse.Namespace) -> None:
    """Let PyTorch use the --threads asked for. Raises InputError for none."""
    import torch

    check_counts(args, "threads")
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def given(kind: type[Options], args: argparse.Namespace, **more: Any) -> Options:
    """An options dataclass, from the arguments that are named like its fields, and from ``more``."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**({name: value for name, value in vars(args).items() if name in names} | more))


def check_counts(options: Any, *names: str, least: int = 1) -> None:
    """Raises InputError for the first of the named arguments, or fields, that is given and too small."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def check_shares(options: Any, *names: str) -> None:
    """Raises InputError for the first of the named arguments, or fields, that is not a share, 0 to 1."""
    for name in names:
        if not 0 <= (share := getattr(options, name)) <= 1:
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
