"""The sprites world's command line: ``draw`` a request, ``score`` a bundle, hold it to a ``gate``, ``sweep``
its steps, show a ``gallery``, ``train`` the shipped model.

Exit codes as for ``conceptmaster``: 0 done, 1 failed, 2 wrong input, 130 interrupted; an error is one line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from conceptmaster.errors import InputError
from conceptmaster.runtime.commands import Command, in_module, run_program

from .arguments import add_options, add_quiet, options_from

DRAW = "Writes a request that can be generated: its pictures, request.json, and the true video, truth.mp4."
SCORE = """\
Generates a video for every seed, with looks that were never trained on, and counts from its frames how often
each concept has its own look, noun and motion in its place. Two controls use the same noise: no concepts, and
pictures swapped but judged as if they were not. `draw --seed N` with the same options shows the request
behind seed N.
"""
SHEET_ROWS = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (sys.argv's if argv is None); returns its exit code, see the module's text."""
    description = "The small drawn world that the shipped model was trained on."
    return run_program("python -m conceptmaster.examples.sprites", description, COMMANDS, argv)


def _add_draw(parser: argparse.ArgumentParser) -> None:
    from .scoring.score import Options

    parser.description = DRAW
    parser.add_argument("--seed", type=int, required=True, metavar="N", help="of the scene, 0 or more")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder, made where it is missing")
    add_options(parser, Options, "concepts", "same_noun")
    parser.add_argument("--train-split", action="store_true", help="looks that are trained on, not held out")
    parser.add_argument("--no-truth", action="store_true", help="leave out truth.mp4")


def _draw(args: argparse.Namespace) -> int:
    from conceptmaster.runtime.request import MAX_SEED

    from .scoring.score import check_wishes, judged_scene
    from .world.requesting import write_request

    if not 0 <= args.seed <= MAX_SEED:
        raise InputError(f"--seed must be 0 to {MAX_SEED}, not {args.seed}")
    check_wishes(args.concepts, args.same_noun)
    scene = judged_scene(args.seed, args.concepts, args.same_noun, held_out=not args.train_split)
    print(write_request(scene, Path(args.output), truth=not args.no_truth))
    print(scene.caption)
    return 0


def _add_score(parser: argparse.ArgumentParser) -> None:
    from .scoring.score import Options

    parser.description = SCORE
    add_options(parser, Options)
    parser.add_argument(
        "--no-controls", action="store_true", help="leave out the two controls: a third of the time"
    )
    parser.add_argument(
        "--truth", action="store_true", help="score the true videos: what a perfect model gets"
    )
    parser.add_argument(
        "--shuffled", action="store_true", help="with --truth: the next request's video: chance"
    )
    add_quiet(parser)
    parser.add_argument("--output", metavar="FILE.json", help="also write the report")
    parser.add_argument("--sheet", metavar="FILE.png", help=f"also draw the first {SHEET_ROWS} requests")
    parser.add_argument(
        "--json", action="store_true", help="last line on standard output: the report, one line"
    )


def _score(args: argparse.Namespace) -> int:
    from conceptmaster.atomic_write import check_output

    from .scoring.reports import score_table, write_json
    from .scoring.score import Options, score

    if args.shuffled and not args.truth:
        raise InputError("--shuffled needs --truth")
    source = ("shuffled" if args.shuffled else "truth") if args.truth else "model"
    options = options_from(Options, args, source=source, controls=not args.no_controls)
    output = None if args.output is None else check_output(Path(args.output), (".json",))
    sheet = None if args.sheet is None else check_output(Path(args.sheet), (".png",))
    report, results = score(options, keep=SHEET_ROWS if sheet else 0, progress=not args.quiet)
    if output is not None:
        write_json(output, report)
    if sheet is not None:
        from .scoring.sheet import save_sheet, scored_row

        save_sheet([scored_row(options.scene(r.seed), r) for r in results[:SHEET_ROWS]], sheet)
    print(score_table(report))
    if args.json:
        print(json.dumps(report))
    return 0


def _in_file(name: str, summary: str, folder: str) -> Command:
    """The command of the file of that name in ``folder``."""
    return in_module(name, summary, f"{__package__}.{folder}.{name}")


def _training(name: str, summary: str) -> Command:
    """A command of training/cli.py."""
    return in_module(name, summary, f"{__package__}.training.cli", "train", name)


def _paper(name: str, summary: str) -> Command:
    """A command of paper/cli.py."""
    return in_module(name, summary, f"{__package__}.paper.cli", "train", name.replace("-", "_"))


COMMANDS = (
    Command("draw", "write a request of this world, with its true video", _add_draw, _draw),
    Command("score", "measure whether a bundle binds, on looks held out", _add_score, _score),
    _in_file("gate", "hold a bundle's score to the recorded baseline", "scoring"),
    _in_file("sweep", "score every solver, number of steps and guidance", "scoring"),
    _in_file("place", "measure whether boxes place concepts", "scoring"),
    _in_file("gallery", "show the first requests, and the worst", "scoring"),
    _training("train", "train the shipped model from nothing"),
    _training("tune", "tune a base on each request: CustomDiffusion, DreamBooth"),
    _paper("paper", "train and score the rows of the paper's tables on one frozen base"),
    _paper("paper-base", "train that base"),
    _paper("paper-weights", "write that base as weights, for tune and conceptmaster export"),
    in_module("scorer", "train MC-Bench's scorer", f"{__package__}.mc_bench.command", "train", "scorer"),
    in_module("mc-bench", "MC-Bench of this world", f"{__package__}.mc_bench.command", "mc-bench", "bench"),
    _in_file("curves", "draw the curves of a training", "training"),
)
