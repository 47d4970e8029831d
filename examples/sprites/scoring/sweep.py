"""How the scores fall with fewer steps, for every solver, without and with guidance.

Every row is scored on the same scenes from the same noise. The file is written after each row, so that a
sweep that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from conceptmaster import __version__
from conceptmaster.atomic_write import check_output
from conceptmaster.errors import InputError
from conceptmaster.hashed import sha256_file
from conceptmaster.runtime.bundle_format.find import Bundle
from conceptmaster.runtime.bundle_format.manifest import FILE_NAME
from conceptmaster.runtime.cpus import usable
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.solver import SOLVERS

from ..arguments import add_options, add_quiet, options_from
from .judging import Generate
from .measures import MEASURES
from .plot import import_matplotlib, plot_sweep
from .reports import Row, percent, read_record, write_json
from .score import Options, check_bundle, score, summary

CONCEPTS = 2
STEPS = (50, 20, 10, 6, 4)
GUIDANCE = (1.0, 2.5)
TOLERANCE = 0.01

SWEEP = """\
Scores a bundle with every solver, number of steps and guidance asked for, on two concepts, and says which is
the cheapest that loses nothing. Guidance 1 is no guidance: the request alone decides.
"""


@dataclass(frozen=True)
class Record:
    """A sweep as it is written. settings: what all rows share; chance: measure → 0..1."""

    world: str
    settings: dict
    versions: dict
    chance: dict[str, float]
    rows: tuple[Row, ...]


def sweep(
    ways: Sequence[Options],
    path: Path,
    *,
    resume: bool = False,
    generate: Generate | None = None,
    progress: bool = False,
    done: Callable[[Row], object] = lambda row: None,
) -> Record:
    """Scores every way of sampling and writes ``path`` after each.

    Args: ways: from ``make_ways``; resume: keep the rows that ``path`` has, which may be others than asked
    for now; generate: what is judged instead of the bundle; progress: show bars on standard error; done: is
    called with each new row.

    Returns: the whole record. Raises InputError for a way that the bundle has not, for a file that is there
    although nothing is resumed, and for one that is damaged or of other settings; what ``score`` raises.
    """
    empty = _empty(ways, opened=generate is None)
    record = _resumed(path, empty) if resume and path.exists() else empty
    if path.exists() and not resume:
        raise InputError(f"{str(path)!r} is there already: go on with --resume, or write another file")
    finished = {row.key for row in record.rows}
    for way in ways:
        assert way.solver is not None and way.steps is not None and way.guidance is not None
        if (way.solver, way.guidance, -way.steps) in finished:
            continue
        report, _ = score(way, generate=generate, progress=progress)
        row = Row(
            way.solver,
            way.steps,
            way.guidance,
            {measure: report[measure] for measure in MEASURES},
            {measure: report["standard_errors"][measure] for measure in MEASURES},
            report["seconds_per_video"],
            way.workers,
        )
        record = replace(record, rows=tuple(sorted([*record.rows, row], key=lambda row: row.key)))
        write_json(path, asdict(record))
        done(row)
    return record


def make_ways(
    options: Options, solvers: Sequence[str], steps: Sequence[int], guidance: Sequence[float]
) -> list[Options]:
    """Every combination once, in the order of ``Row.key``; the rest as in ``options``. Raises InputError."""
    chosen = sorted({(solver, scale, -count) for solver in solvers for count in steps for scale in guidance})
    options = replace(options, concepts=CONCEPTS, controls=False, source="model")
    return [replace(options, solver=solver, steps=-count, guidance=scale) for solver, scale, count in chosen]


def cheapest(rows: Sequence[Row], tolerance: float = TOLERANCE) -> tuple[Row, Row]:
    """The row of fewest steps of which no measure is more than ``tolerance`` below the reference.

    The reference is the best row, by the mean of its measures, of those with most steps; so is the cheapest
    of those with equally few. Returns both: cheapest, reference. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("no rows to choose from")

    def mean(row: Row) -> float:
        return sum(row.scores[measure] for measure in MEASURES) / len(MEASURES)

    most = max(row.steps for row in rows)
    reference = max((row for row in rows if row.steps == most), key=mean)
    good = [
        row for row in rows if all(row.scores[m] >= reference.scores[m] - tolerance - 1e-9 for m in MEASURES)
    ]
    return min(good, key=lambda row: (row.steps, -mean(row))), reference


def _empty(ways: Sequence[Options], opened: bool) -> Record:
    """The record without rows, every way checked against the bundle."""
    options = ways[0]
    settings: dict[str, Any] = {"bundle": None, "precision": None, "manifest_sha256": None}
    if opened:
        bundle = Bundle.open(options.bundle)
        check_bundle(bundle.manifest)
        for way in ways:
            asked = Request("checks", steps=way.steps, guidance=way.guidance, solver=way.solver)
            asked.resolve(bundle.manifest)
        settings = {
            "bundle": bundle.manifest.name,
            "precision": bundle.manifest.precision,
            "manifest_sha256": sha256_file(bundle.folder / FILE_NAME),  # which holds every other file's hash
        }
    settings |= {
        "seeds": [options.seeds.start, options.seeds.stop],
        "concepts": options.concepts,
        "same_noun": options.same_noun,
        "device": options.device,
    }
    chance = summary([], options.concepts)["chance"]
    return Record("sprites", settings, {"conceptmaster": __version__}, chance, ())


def _resumed(path: Path, empty: Record) -> Record:
    """The record in ``path``, which must be of the same settings. Raises InputError."""
    record = read_record(Record, path, "sweep", "write another file")
    there, here = ({**r.settings, **r.versions, "world": r.world} for r in (record, empty))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise InputError(
                f"{str(path)!r} is a sweep of other settings: {name} is {there.get(name)!r} there and "
                f"{here.get(name)!r} now; write another file"
            )
    return record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sweep``."""
    parser.description = SWEEP
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.json", help="rows and settings")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also a chart (needs matplotlib)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --output has already")
    names = ("bundle", "seeds", "same_noun", "device", "workers")
    add_options(parser, Options, *names, workers=usable())
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, metavar="N", help="(50 20 10 6 4)")
    parser.add_argument(
        "--solvers", nargs="+", default=SOLVERS, metavar="NAME", help=f"({' '.join(SOLVERS)})"
    )
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=GUIDANCE, metavar="G", help="1 is none (1 2.5)"
    )
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Sweeps, prints each row and the cheapest that is as good, draws the plot; returns 0.

    Raises InputError, MissingDependency, and what ``score`` raises.
    """
    output = check_output(args.output, (".json",))
    if args.plot is not None:
        check_output(args.plot, (".png",))
        import_matplotlib()  # so that a missing package does not show only after the last row
    options = options_from(Options, args, steps=None, guidance=None)
    ways = make_ways(options, args.solvers, args.steps, args.guidance)
    record = sweep(
        ways,
        output,
        resume=args.resume,
        progress=not args.quiet,
        done=lambda row: print(_line(row), flush=True),
    )
    if args.plot is not None:
        plot_sweep(record.rows, record.chance, args.plot)
    best, reference = cheapest(record.rows)
    print(f"cheapest within {100 * TOLERANCE:g} point of ({reference}): {best}")
    return 0


def _line(row: Row) -> str:
    shares = ", ".join(f"{measure} {percent(row.scores[measure])}" for measure in MEASURES)
    return f"{row}: {shares}; {row.seconds_per_video:.2f} s a video"
