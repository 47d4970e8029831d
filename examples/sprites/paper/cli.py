"""The commands `paper`, `paper-base` and `paper-weights`. PyTorch, which no help needs, is imported later."""

from __future__ import annotations

import argparse
from pathlib import Path

from .rows import ROWS

EXAMPLES = Path(__file__).parents[1]
BASE, WEIGHTS = EXAMPLES / "paper-base", EXAMPLES / "weights"


def add_paper_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``paper``."""
    names = [row.name for row in ROWS]
    parser.add_argument("--output", required=True, type=Path, help="folder for pool, checkpoints and results")
    parser.add_argument(
        "--base", type=Path, default=BASE, metavar="DIR", help="what all rows stand on (ours)"
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ROW", help=_list(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trainings (0 1 2)")
    parser.add_argument("--steps", type=int, default=512, help="of training, 32 clips each (512)")
    parser.add_argument("--requests", type=int, default=200, help="that are scored (200)")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="(OUTPUT/paper_tables.json)")
    parser.add_argument("--document", type=Path, metavar="FILE.md", help="whose tables are rewritten, too")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="what rows make of the same requests")
    _add_shared(parser)


def add_paper_base_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``paper-base``."""
    parser.add_argument("--output", required=True, type=Path, help="folder for pool, checkpoints and base")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="DIR", help="encoders' (shipped)")
    parser.add_argument("--vae", type=Path, default=BASE, metavar="DIR", help="folder of the VAE (ours)")
    parser.add_argument("--steps", type=int, default=2400, help="of the transformer (2400)")
    parser.add_argument("--lr", type=float, default=0.012, help="Muon's learning rate (0.012)")
    parser.add_argument("--eye-steps", type=int, default=400, help="of the picture encoder (400)")
    _add_shared(parser)


def add_paper_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``paper-weights``."""
    parser.add_argument("--output", required=True, type=Path, help="a new weights folder")
    parser.add_argument("--base", type=Path, default=BASE, metavar="DIR", help="what it is made of (ours)")


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clips", type=int, default=16384, help="in the pool, drawn once (16384)")
    parser.add_argument("--threads", type=int, help="CPU threads (as PyTorch has it)")


def _list(names: list[str]) -> str:
    return f"which rows to run, of {', '.join(names)} (all)"


def run_paper(args: argparse.Namespace) -> int:
    """Runs `paper`, see `command.run`."""
    from .command import run

    return run(args)


def run_paper_base(args: argparse.Namespace) -> int:
    """Runs `paper-base`, see `command.run_base`."""
    from .command import run_base

    return run_base(args)


def run_paper_weights(args: argparse.Namespace) -> int:
    """Runs `paper-weights`, see `command.run_weights`."""
    from .command import run_weights

    return run_weights(args)
