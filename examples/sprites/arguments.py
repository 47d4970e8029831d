"""Command-line arguments that several of the world's commands share, and options made of them."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from typing import Any, TypeVar

from conceptmaster.errors import InputError
from conceptmaster.runtime.cpus import check_threads, usable
from conceptmaster.runtime.request import MAX_SEED

Options = TypeVar("Options")
LAST_SEED = 2**32 - 1
"""Of a training, whose random numbers are counted on from it."""
MOST_REQUESTS = 1_000_000


def seed_range(text: str) -> range:
    """``"A:B"`` as the seeds A to B - 1; whether A < B is checked with the options that they become.

    For argparse's ``type``: raises ArgumentTypeError for anything else.
    """
    found = re.fullmatch(r"(\d{1,20}):(\d{1,20})", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be two numbers A:B with A < B, not {text!r}")
    return range(int(found[1]), int(found[2]))


def option(default: Any, help: str, **how: Any) -> Any:
    """A field of an options dataclass that ``add_options`` makes an argument of; ``how``: what argparse is
    told besides."""
    return dataclasses.field(default=default, metadata={"help": help, **how})


def add_options(parser: argparse.ArgumentParser, kind: type, *names: str, **defaults: Any) -> None:
    """An argument for each ``option`` of an options dataclass, or for those named: with its name, its type,
    and its default, unless ``defaults`` has another. A help that ends in brackets says the default itself."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if not field.metadata or (names and field.name not in names):
            continue
        how = dict(field.metadata)
        how["default"] = default = defaults.get(field.name, field.default)
        if default is False:
            how["action"] = "store_true"
        else:
            how.setdefault("type", (typing.get_args(hints[field.name]) or (hints[field.name],))[0])
            if not how["help"].endswith(")"):
                how["help"] += f" ({default})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", **how)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """--quiet, for commands that score many videos."""
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """--clips and --workers, for commands that train a model on drawn clips."""
    parser.add_argument(
        "--clips",
        type=int,
        default=1024,
        help="clips at a time, of which an eighth or less is drawn anew every 100 steps; a GPU keeps 98304 "
        "in 30 GB (1024)",
    )
    parser.add_argument(
        "--workers", type=int, default=usable(), help="processes that make scenes (one per core)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --threads, for commands that train."""
    parser.add_argument("--device", type=_device, default="", help="cpu or cuda (cuda where there is a GPU)")
    parser.add_argument("--threads", type=int, help="CPU threads (as PyTorch has it)")


def _device(name: str) -> str:
    """`name`, or the device that is there: asked for when arguments are parsed, which their help is not."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(args: argparse.Namespace) -> None:
    """Let PyTorch use the --threads asked for. Raises InputError for none, and for too many."""
    import torch

    if args.threads is not None:
        torch.set_num_threads(check_threads(args.threads))


def options_from(kind: type[Options], args: argparse.Namespace, **more: Any) -> Options:
    """An options dataclass, from the arguments that are named like its fields, and from ``more``."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**({name: value for name, value in vars(args).items() if name in names} | more))


def check_counts(options: Any, *names: str, least: int = 1) -> None:
    """Raises InputError for the first of the named arguments, or fields, that is given and too small."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def check_seed(seed: int) -> None:
    """Raises InputError for a --seed that no training can have."""
    if not 0 <= seed <= LAST_SEED:
        raise InputError(f"--seed must be 0 to {LAST_SEED}, got {seed}")


def check_seeds(seeds: range) -> None:
    """Raises InputError for seeds of requests that are none, too large or too many."""
    first, end = seeds.start, seeds.stop
    if seeds.step != 1 or not 0 <= first < end <= MAX_SEED + 1:
        raise InputError(f"seeds must be A:B with 0 <= A < B <= 2**63, not {first}:{end}")
    if end - first > MOST_REQUESTS:
        raise InputError(f"{first}:{end} are {end - first} requests, more than {MOST_REQUESTS}")


def check_shares(options: Any, *names: str) -> None:
    """Raises InputError for the first of the named arguments, or fields, that is not a share, 0 to 1."""
    for name in names:
        if not 0 <= (share := getattr(options, name)) <= 1:
            raise InputError(f"--{name} must lie between 0 and 1, got {share}")
