"""The open world's command line: ``fetch`` the picture sets, ``train`` the model and its ``decoder``,
``score`` a bundle.

Exit codes as for ``conceptmaster``: 0 done, 1 failed, 2 wrong input, 130 interrupted; an error is one line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conceptmaster.atomic_write import check_output
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.arguments import (
    add_device,
    add_options,
    add_quiet,
    options_from,
    set_threads,
)
from conceptmaster.runtime.commands import Command, run_program
from conceptmaster.runtime.cpus import usable

ATLAS = Path("stickers-atlas.npz")
SHEET_ROWS = 8
OPEN = ("batch_size", "lr", "captions", "log_every", "workers", "seeing", "reading")
"""Options whose defaults depend on others."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (sys.argv's if argv is None); returns its exit code, see the module's text."""
    description = "The open world: any pictures, any words."
    return run_program("python -m conceptmaster.examples.stickers", description, COMMANDS, argv)


def _add_atlas(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--atlas", type=Path, default=ATLAS, metavar="FILE", help=f"the rendered pictures ({ATLAS})"
    )


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fetches the picture sets from the npm registry and Debian, and renders them into one atlas."
    )
    parser.add_argument(
        "--cache", type=Path, required=True, metavar="DIR", help="where the archives are kept"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="SET",
        help="sets to leave out, where they cannot be fetched or are not wanted",
    )
    _add_atlas(parser)


def _fetch(args: argparse.Namespace) -> int:
    from .world import atlas

    built = atlas.build(args.cache, args.without)
    built.save(args.atlas)
    found = {split: built.of(split) for split in atlas.SPLITS}
    told = (
        f"{split}: {sum(map(len, nouns.values()))} of {len(nouns)} nouns" for split, nouns in found.items()
    )
    print(f"{args.atlas}: pictures of {', '.join(told)}")
    return 0


def _add_train(parser: argparse.ArgumentParser) -> None:
    from .training.options import Options

    parser.description = "Trains the model; goes on exactly where the same command was interrupted."
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the training's folder")
    _add_atlas(parser)
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="a checkpoint of this world to begin from, with a fresh optimizer (the sprites' weights)",
    )
    add_options(parser, Options, **dict.fromkeys(OPEN))
    add_device(parser)


def _train(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    from .training.options import ON_GPU, Options
    from .training.train import train
    from .world import atlas

    usual = ON_GPU | {"workers": usable()} if args.device.startswith("cuda") else {}
    if args.start is not None:
        usual |= {"seeing": 0, "reading": 0}
    for name in OPEN:
        if getattr(args, name) is None:
            delattr(args, name)
    options = options_from(Options, argparse.Namespace(**(usual | vars(args))))
    set_threads(args)
    train(atlas.load(args.atlas), args.output, options, args.start, began)
    return 0


def _add_decoder(parser: argparse.ArgumentParser) -> None:
    from .training.options import DecoderOptions

    parser.description = "Trains the network of the VAE's decoder in the folder of a training; resumes."
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the training's folder")
    _add_atlas(parser)
    add_options(parser, DecoderOptions)
    add_device(parser)


def _decoder(args: argparse.Namespace) -> int:
    from .training.decoder import train_decoder
    from .training.options import DecoderOptions
    from .world import atlas

    options = options_from(DecoderOptions, args)
    set_threads(args)
    train_decoder(atlas.load(args.atlas), args.output, options)
    return 0


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.description = "Packs a training's weights into a checkpoint for `train --start`, 8 bits a weight."
    parser.add_argument("--training", type=Path, required=True, metavar="DIR", help="the training's folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the checkpoint's folder")
    _add_overwrite(parser)


def _pack(args: argparse.Namespace) -> int:
    from .training.packing import pack_folder

    for path in pack_folder(args.training, args.output, overwrite=args.overwrite):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a training's weights in 16 bits, as `conceptmaster export` reads them."
    parser.add_argument("--training", type=Path, required=True, metavar="DIR", help="the training's folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the weights' folder")
    _add_overwrite(parser)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace one that is there")


def _weights(args: argparse.Namespace) -> int:
    from .training.shipping import collect

    collect(args.training, args.output, overwrite=args.overwrite)
    return 0


def _add_score(parser: argparse.ArgumentParser) -> None:
    from .scoring.options import Options

    parser.description = "Generates a video for every seed, with pictures that were never trained on."
    add_options(parser, Options)
    _add_atlas(parser)
    parser.add_argument("--no-places", action="store_true", help="captions tell no places: anywhere will do")
    parser.add_argument(
        "--no-controls", action="store_true", help="leave out the controls: a third of the time"
    )
    parser.add_argument(
        "--truth", action="store_true", help="score the true videos: what a perfect model gets"
    )
    parser.add_argument("--shuffled", action="store_true", help="with --truth: the next request's: chance")
    parser.add_argument("--sheet", metavar="FILE.png", help=f"also draw the first {SHEET_ROWS} requests")
    parser.add_argument("--failures", metavar="FILE.png", help="and those that lost most contests")
    parser.add_argument(
        "--json", action="store_true", help="last line on standard output: the report, one line"
    )
    add_quiet(parser)


def _score(args: argparse.Namespace) -> int:
    from conceptmaster.examples.sprites.scoring.sheet import save_sheet

    from .scoring.options import Options
    from .scoring.score import asked, rows, score, worst_rows

    if args.shuffled and not args.truth:
        raise InputError("--shuffled needs --truth")
    source = ("shuffled" if args.shuffled else "truth") if args.truth else "model"
    options = options_from(
        Options, args, places=not args.no_places, controls=not args.no_controls, source=source
    )
    sheet, failures = (
        None if file is None else check_output(Path(file), (".png",)) for file in (args.sheet, args.failures)
    )
    report, results = score(options, keep=SHEET_ROWS if sheet else 0, progress=not args.quiet)
    if sheet is not None:
        save_sheet(rows(options, results[:SHEET_ROWS]), sheet)
    if failures is not None and (worst := worst_rows(options, results, SHEET_ROWS)):
        save_sheet(worst, failures)
    print(_table(report, asked(options)))
    if args.json:
        print(json.dumps(report))
    return 0


def _table(report: dict[str, Any], measures: tuple[str, ...]) -> str:
    """The report for people: a line per measure, a column per video, in percent with standard errors."""
    columns = {"as asked": "", "no concepts": "_no_concepts", "swapped": "_swapped", "no boxes": "_no_boxes"}
    shown = {t: n for t, n in columns.items() if any(report.get(m + n) is not None for m in measures)}
    lines = [f"{report['requests']} requests of {report['concepts']}, {report['seconds']:.1f} s; in percent:"]
    lines.append(f"{'':14}" + "".join(f"{title:>16}" for title in shown) + f"{'chance':>10}")
    for measure in measures:
        if report[measure] is None:
            continue
        cells = [_cell(report[measure + n], report["standard_errors"][measure + n]) for n in shown.values()]
        chance = _cell(report["chance"][measure], None)
        lines.append(f"{measure:14}" + "".join(f"{cell:>16}" for cell in cells) + f"{chance:>10}")
    return "\n".join(lines)


def _cell(share: float | None, error: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.1f}" if error is None else f"{100 * share:.1f} ± {100 * error:.1f}"


COMMANDS = (
    Command("fetch", "fetch the picture sets and render them", _add_fetch, _fetch),
    Command("train", "train the model", _add_train, _train, "train"),
    Command("decoder", "train the VAE's network beside it", _add_decoder, _decoder, "train"),
    Command("pack", "make a small checkpoint of a training", _add_pack, _pack, "train"),
    Command("weights", "write what `conceptmaster export` reads", _add_weights, _weights, "train"),
    Command("score", "measure whether a bundle binds pictures never trained on", _add_score, _score, "train"),
)
