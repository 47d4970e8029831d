"""The commands `scorer` and `mc-bench`. Their help needs no PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path

from conceptmaster.errors import ConceptMasterError, InputError

WEIGHTS = Path(__file__).resolve().parents[1] / "scorer" / "scorer.safetensors"
SCORER = """\
Trains the small network that stands in CLIP's and DINO's place in MC-Bench of this world, on looks that are
not held out. An interrupted training goes on.
"""
BENCH = """\
MC-Bench with this world's scorer: the shipped model, its controls (without concepts, pictures swapped), int8,
other numbers of steps and the true videos in one table. The scorer is admitted only if it separates true from
swapped videos and agrees with the exact judge. An interrupted run goes on.
"""


def add_scorer_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scorer`."""
    parser.description = SCORER
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets scorer.safetensors")
    parser.add_argument("--steps", type=int, default=450, metavar="N", help="of training (450)")


def run_scorer(args: argparse.Namespace) -> int:
    """Trains the scorer."""
    from ..world.requesting import make_folder
    from .train_scorer import train_scorer

    if args.steps < 1:
        raise InputError(f"--steps must be 1 or more, not {args.steps}")
    make_folder(args.output)
    train_scorer(args.output, args.steps)
    return 0


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mc-bench`."""
    parser.description = BENCH
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="videos, scores, report")
    parser.add_argument("--requests", type=int, default=40, metavar="N", help="of two concepts each (40)")
    parser.add_argument("--scorer", type=Path, default=WEIGHTS, metavar="FILE", help="(the one that ships)")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="the report (OUTPUT/report.json)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run_bench(args: argparse.Namespace) -> int:
    """Runs the table; fails, after the numbers, where the scorer is not admitted."""
    from conceptmaster.atomic_write import check_output
    from conceptmaster.benchmarks import reports

    from ..world.requesting import make_folder
    from .bench import bench, table

    if not 2 <= args.requests <= 5000:
        raise InputError(f"--requests must be 2 to 5000, not {args.requests}")
    if not args.scorer.is_file():
        raise InputError(
            f"no scorer at {str(args.scorer)!r}: `python -m conceptmaster.examples.sprites scorer` trains one"
        )
    make_folder(args.output)
    results = check_output(args.results or args.output / "report.json", (".json",))
    report, admission = bench(args.output, args.requests, args.scorer, progress=not args.quiet)
    print(", ".join(f"{name} {value:.3f}" for name, value in vars(admission).items()))
    if admission.reasons:
        raise ConceptMasterError(f"the scorer is not admitted: {'; '.join(admission.reasons)}")
    reports.write(report, results)
    print(table(report["rows"]))
    return 0
