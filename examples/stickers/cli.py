"""The open world's commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from conceptmaster.errors import ConceptMasterError

ATLAS = Path("stickers-atlas.npz")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. A user's mistake is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m conceptmaster.examples.stickers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_fetch(commands)
    _add_train(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ConceptMasterError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
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
