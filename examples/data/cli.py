"""The data pipeline's command line: make ``pairs`` of a folder of videos; ``draw`` videos whose truth is
known, and ``score`` pairs of these.

Exit codes as for ``conceptmaster``: 0 done, 1 failed, 2 wrong input, 130 interrupted; an error is one line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.arguments import add_options, check_counts, options_from
from conceptmaster.runtime.commands import Command, run_program
from conceptmaster.runtime.progress import shown


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (sys.argv's if argv is None); returns its exit code, see the module's text."""
    description = "Concept-video training pairs out of videos, as the paper's data pipeline makes them."
    return run_program("python -m conceptmaster.examples.data", description, COMMANDS, argv)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    from .parts import Models
    from .thresholds import Thresholds

    parser.description = (
        "Makes pairs of pictures and videos; goes on where the same command was interrupted. A changed "
        "threshold does anew what depends on it."
    )
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="the videos' folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the pairs go")
    parser.add_argument(
        "--taxonomy", type=Path, metavar="FILE", help="classes in taxonomy.txt's form (120 of our own)"
    )
    add_options(parser.add_argument_group("models, none of which ships"), Models)  # type: ignore[arg-type]
    parser.add_argument("--device", default="cpu", help="of the models: cpu or cuda (cpu)")
    add_options(parser.add_argument_group("thresholds"), Thresholds)  # type: ignore[arg-type]
    _add_quiet(parser)
    parser.add_argument(
        "--json", action="store_true", help="last line on standard output: the report, one line"
    )


def _pairs(args: argparse.Namespace) -> int:
    from .making import check, make
    from .parts import Models, open_parts
    from .taxonomy import OWN, Taxonomy
    from .thresholds import Thresholds

    thresholds, models = options_from(Thresholds, args), options_from(Models, args)
    taxonomy = Taxonomy.read(args.taxonomy or OWN)
    check(args.videos, args.output)
    parts = open_parts(models, thresholds, list(taxonomy.kinds), args.device)
    report = make(args.videos, args.output, thresholds, taxonomy, parts, shown(args.quiet))
    counts = f"{report['pairs']} pairs in {report['clips']} clips of {report['videos']} videos"
    print(f"{counts}: {args.output / 'report.md'}")
    for text in report["without"]:
        print(f"without {text}")
    if args.json:
        print(json.dumps(report))
    return 0


def _add_draw(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draws videos of the sprites world, with captions, and truth.jsonl: what they show where."
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the videos go")
    parser.add_argument(
        "--videos", type=int, default=40, help="good ones, of one and two concepts in turn (40)"
    )
    parser.add_argument(
        "--spoiled",
        type=int,
        default=0,
        help="besides, such that must be dropped: with a cut, still, dark … (0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first (0)")
    _add_quiet(parser)


def _draw(args: argparse.Namespace) -> int:
    from .drawn import write

    check_counts(args, "videos", "spoiled", "seed", least=0)
    if not args.videos + args.spoiled:
        raise InputError("--videos and --spoiled are both 0: nothing to draw")
    write(args.output, args.videos, args.spoiled, args.seed, shown(args.quiet))
    return 0


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compares pairs of drawn videos with the truth; the last line is JSON."
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="the drawn videos' folder")
    parser.add_argument(
        "--pairs", type=Path, required=True, metavar="DIR", help="the folder that `pairs` made"
    )


def _score(args: argparse.Namespace) -> int:
    from .score import line, score

    print(line(score(args.videos, args.pairs)))
    return 0


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


COMMANDS = (
    Command("pairs", "make pairs of a folder of videos", _add_pairs, _pairs, "data"),
    Command("draw", "draw videos whose truth is known", _add_draw, _draw, "data"),
    Command("score", "compare pairs of drawn videos with the truth", _add_score, _score, "data"),
)
