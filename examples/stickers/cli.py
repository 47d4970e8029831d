"""The open world's commands."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from conceptmaster.errors import ConceptMasterError, InputError
from conceptmaster.examples.sprites.arguments import seed_range

ATLAS = Path("stickers-atlas.npz")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. A user's mistake is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m conceptmaster.examples.stickers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_fetch(commands)
    _add_train(commands)
    _add_score(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ConceptMasterError as error:
        print(f"stickers: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stickers: error: interrupted", file=sys.stderr)
        return 130
    return 0


def _add_fetch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("fetch", help="fetch the picture sets and render them into one atlas")
    command.add_argument(
        "--cache", type=Path, required=True, metavar="DIR", help="where the archives are kept"
    )
    command.add_argument("--atlas", type=Path, default=ATLAS, metavar="FILE", help=f"the atlas ({ATLAS})")
    command.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> None:
    from .world import atlas

    built = atlas.build(args.cache)
    built.save(args.atlas)
    counts = {
        split: (len(found), sum(map(len, found.values()))) for split, found in atlas.splits(built).items()
    }
    told = ", ".join(f"{split}: {pictures} of {nouns} nouns" for split, (nouns, pictures) in counts.items())
    print(f"{args.atlas}: {len(built.tiles)} pictures ({told})")


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "train", help="train; goes on exactly where the same command was interrupted"
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="the training's folder")
    command.add_argument("--atlas", type=Path, default=ATLAS, metavar="FILE", help=f"the atlas ({ATLAS})")
    command.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="a checkpoint of this world to begin from, with a fresh optimizer (the sprites' weights)",
    )
    command.add_argument("--minutes", type=float, help="of training, all runs of the folder together")
    command.add_argument("--steps", type=int, help="of training, in the place of minutes")
    command.add_argument("--batch-size", type=int, default=48, metavar="B", help="clips of a step (48)")
    command.add_argument("--lr", type=float, default=0.008, help="of matrices; others take an eighth (0.008)")
    command.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
    command.add_argument("--seed", type=int, default=0, help="of everything (0)")
    command.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from .training.train import Options, train
    from .world import atlas

    names = ("minutes", "steps", "batch_size", "lr", "device", "seed")
    options = Options(**{name: getattr(args, name) for name in names})
    train(atlas.load(args.atlas), args.output, options, args.start)


def _add_score(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("score", help="measure whether a bundle binds pictures never trained on")
    add = command.add_argument
    add("--seeds", type=seed_range, default=range(64), metavar="A:B", help="of scenes and noise (0:64)")
    add("--concepts", type=int, default=2, metavar="K", help="concepts in a scene, 1 to 4 (2)")
    add("--same-noun", action="store_true", help="two of them share their noun; else all differ")
    add("--split", default="nouns", help="nouns or sets that were never trained on, or train (nouns)")
    add("--made-up-labels", action="store_true", help="labels are words that nobody has read")
    add("--no-places", action="store_true", help="captions tell no places: concepts may be anywhere")
    add("--atlas", type=Path, default=ATLAS, metavar="FILE", help=f"the atlas ({ATLAS})")
    add("--pictures", type=Path, metavar="DIR", help="PNGs with alpha, named by their labels, instead")
    add("--bundle", default="stickers", metavar="NAME", help="shipped bundle or a path (stickers)")
    add("--steps", type=int, metavar="N", help="model evaluations (the bundle's default)")
    add("--guidance", type=float, metavar="G", help="(the bundle's default)")
    add("--no-controls", action="store_true", help="leave out the two controls: a third of the time")
    add("--truth", action="store_true", help="score the true videos: what a perfect model gets")
    add("--shuffled", action="store_true", help="with --truth: the next request's video: chance")
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (one per core)")
    add("--workers", type=int, default=1, metavar="W", help="processes, of one thread each (1)")
    add("--json", action="store_true", help="last line on standard output: the report, one line")
    add("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> None:
    from .scoring.score import Options, asked, score

    if args.shuffled and not args.truth:
        raise InputError("--shuffled needs --truth")
    same = "seeds concepts same_noun split made_up_labels atlas pictures bundle steps guidance device threads"
    given = {name: getattr(args, name) for name in (*same.split(), "workers")}
    source = ("shuffled" if args.shuffled else "truth") if args.truth else "model"
    options = Options(places=not args.no_places, source=source, controls=not args.no_controls, **given)
    report, _ = score(options, progress=not args.quiet)
    print(_table(report, asked(options)))
    if args.json:
        print(json.dumps(report))


def _table(report: dict[str, Any], measures: tuple[str, ...]) -> str:
    """The report for people: a line per measure, a column per video, in percent with standard errors."""
    columns = {"as asked": "", "no concepts": "_no_concepts", "swapped": "_swapped"}
    shown = {t: n for t, n in columns.items() if any(report[m + n] is not None for m in measures)}
    lines = [f"{report['requests']} requests of {report['concepts']}, {report['seconds']:.1f} s; in percent:"]
    lines.append(f"{'':14}" + "".join(f"{title:>16}" for title in shown) + f"{'chance':>10}")
    for measure in measures:
        if report[measure] is None:
            continue
        cells = [_cell(report[measure + n], report["standard_errors"][measure + n]) for n in shown.values()]
        chance = 100 * report["chance"][measure]
        lines.append(f"{measure:14}" + "".join(f"{cell:>16}" for cell in cells) + f"{chance:10.1f}")
    return "\n".join(lines)


def _cell(share: float | None, error: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.1f}" if error is None else f"{100 * share:.1f} ± {100 * error:.1f}"
