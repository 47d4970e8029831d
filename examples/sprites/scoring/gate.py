"""Whether a bundle still makes the picture: its score against a recorded baseline, request by request.

An optimisation changes every pixel a little, and how far its graphs are off does not say whether the video
is still the one asked for. So the bundle is scored on scenes with two concepts, of different nouns and of the
same, and each measure may fall below the baseline by no more than a tolerance. Both are scored on the same
scenes from the same noise, so the difference of two shares is known better than either of them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster.atomic_write import check_output
from conceptmaster.errors import InputError
from conceptmaster.runtime.cpus import usable

from ..arguments import add_options, add_quiet, options_from, seed_range
from .judging import ASKED, Generate
from .measures import MEASURES
from .reports import percent, read_record, write_json
from .score import Options, score

BASELINE = Path(__file__).parents[1] / "baseline.json"
FORMAT = 1
ROWS = {"different nouns": False, "same noun": True}
"""The rows that are scored: name to whether the two concepts share their noun."""
CONCEPTS = 2
SEEDS = range(200)
TOLERANCE = 0.02
SETTINGS = ("solver", "steps", "shift", "guidance", "concept_guidance")

GATE = """\
Scores a bundle as `score` does, two concepts of different nouns and of the same noun, and compares every
measure with the recorded baseline, over the same seeds. Exit code 1 when a measure is more than the tolerance
below it, 2 when the two cannot be compared. Needs no PyTorch: the graphs are not compared with a model.
"""


@dataclass(frozen=True)
class Scores:
    """What a bundle reached, as it is recorded.

    settings, versions: as ``score`` reports them; seeds: first and end; shares: row → measure → 0..1, for
    the reader; won: row → measure → one digit per request, how many of its ``CONCEPTS`` contests it won.
    Raises ValueError where these contradict each other.
    """

    format: int
    world: str
    bundle: str | None
    precision: str | None
    settings: dict
    versions: dict
    seeds: tuple[int, int]
    shares: dict[str, dict[str, float]]
    won: dict[str, dict[str, str]]

    def __post_init__(self) -> None:
        if self.format != FORMAT or self.world != "sprites":
            found = f"format {self.format} of the world {self.world!r}"
            raise ValueError(f"is {found}, this is format {FORMAT} of 'sprites'")
        if not 0 <= self.seeds[0] < self.seeds[1]:
            raise ValueError(f"has impossible seeds {list(self.seeds)}")
        for row in ROWS:
            for measure in MEASURES:
                digits = self.won.get(row, {}).get(measure, "")
                if len(digits) != self.seeds[1] - self.seeds[0] or set(digits) - set("012"):
                    raise ValueError(f"lacks the contests won in {measure!r}, {row}")
                share = self.shares.get(row, {}).get(measure, math.nan)
                if not abs(share - self.counts(row, measure).mean() / CONCEPTS) < 1e-4:
                    raise ValueError(f"has a share of {measure!r}, {row}, that its contests do not add up to")

    def counts(self, row: str, measure: str) -> np.ndarray:
        """Contests won by every request, [requests], 0..CONCEPTS."""
        return np.array([int(digit) for digit in self.won[row][measure]])


@dataclass(frozen=True)
class Line:
    """One measure of one row: the shares won, 0..1, and whether it is still high enough.

    standard_error: of the difference, over requests; None for a single one.
    """

    row: str
    measure: str
    baseline: float
    now: float
    difference: float
    standard_error: float | None
    ok: bool


def measure_bundle(options: Options, *, generate: Generate | None = None, progress: bool = False) -> Scores:
    """Scores both rows.

    Args: options: of which the number of concepts, nouns and controls are set here; generate: what is judged
    instead of the bundle; progress: show bars on standard error. Raises what ``score`` raises.
    """
    won: dict[str, dict[str, str]] = {}
    shares: dict[str, dict[str, float]] = {}
    report: dict[str, Any] = {}
    for row, same_noun in ROWS.items():
        asked = replace(options, concepts=CONCEPTS, same_noun=same_noun, controls=False)
        report, results = score(asked, generate=generate, progress=progress)
        won[row] = {name: "".join(str(sum(r.won[ASKED][name])) for r in results) for name in MEASURES}
        shares[row] = {name: report[name] for name in MEASURES}
    return Scores(
        FORMAT,
        report["world"],
        report["bundle"],
        report.get("precision"),
        {name: report.get(name) for name in SETTINGS},
        report["versions"],
        (options.seeds.start, options.seeds.stop),
        shares,
        won,
    )


def load(path: Path) -> Scores:
    """Reads a baseline. Raises InputError when it is missing or damaged."""
    how = "record that of a good bundle with `python -m conceptmaster.examples.sprites gate BUNDLE --record`"
    return read_record(Scores, path, "baseline", how)


def compare(baseline: Scores, now: Scores, tolerance: float = TOLERANCE) -> list[Line]:
    """Every measure of both rows, over the seeds of ``now``.

    tolerance: how far a share may fall, 0..1. Raises InputError for another one, and where the baseline
    lacks some of the seeds.
    """
    check_comparable(baseline, range(*now.seeds), tolerance)
    first = now.seeds[0] - baseline.seeds[0]
    lines = []
    for row in ROWS:
        for measure in MEASURES:
            after = now.counts(row, measure) / CONCEPTS
            before = baseline.counts(row, measure)[first : first + len(after)] / CONCEPTS
            difference = after - before  # [requests]
            error = float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else None
            ok = bool(difference.mean() >= -tolerance - 1e-9)  # a fall of exactly the tolerance is allowed
            error = None if error is None else round(error, 4)
            then, since, change = (round(float(values.mean()), 4) for values in (before, after, difference))
            lines.append(Line(row, measure, then, since, change, error, ok))
    return lines


def check_comparable(baseline: Scores, seeds: range, tolerance: float) -> None:
    """Raises InputError for seeds that the baseline lacks, and for a tolerance outside 0..1."""
    if not 0 <= tolerance <= 1:
        raise InputError(f"the tolerance must be 0 to 1, not {tolerance:g}")
    first, end = baseline.seeds
    if not first <= seeds.start < seeds.stop <= end:
        raise InputError(
            f"the baseline has the seeds {first}:{end}, not all of {seeds.start}:{seeds.stop}: only the same "
            "requests can be compared"
        )


def verdict(lines: Sequence[Line], tolerance: float) -> str:
    """One line that says whether the picture is kept, or what fell, worst first."""
    fallen = sorted((line for line in lines if not line.ok), key=lambda line: line.difference)
    if not fallen:
        return f"the picture is kept: nothing fell by more than {100 * tolerance:g} points"
    named = ", ".join(f"{line.measure} ({line.row}) by {-100 * line.difference:.1f}" for line in fallen)
    return f"the picture is not kept: fell by more than {100 * tolerance:g} points: {named}"


def table(lines: Sequence[Line]) -> str:
    """The comparison for people, in percent; the difference with its standard error."""
    texts = [f"{'':16}{'':14}{'baseline':>10}{'now':>8}{'difference':>16}"]
    for line in lines:
        shares = f"{percent(line.baseline):>10}{percent(line.now):>8}"
        difference = "+" * (line.difference >= 0) + percent(line.difference, line.standard_error)
        ok = "ok" if line.ok else "FELL"
        texts.append(f"{line.row:16}{line.measure:14}{shares}{difference:>16}  {ok}")
    return "\n".join(texts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``gate``."""
    parser.description = GATE
    parser.add_argument("bundle", metavar="BUNDLE", help="shipped bundle or a path")
    parser.add_argument(
        "--seeds",
        type=seed_range,
        metavar="A:B",
        help=f"fewer of the baseline's (all; recording: {SEEDS.start}:{SEEDS.stop})",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="T",
        help=f"how far a share may fall, 0 to 1 ({TOLERANCE})",
    )
    add_options(parser, Options, "steps", "solver", "guidance", "device", "workers", workers=usable())
    parser.add_argument(
        "--baseline", type=Path, default=BASELINE, metavar="FILE.json", help="(the one that came with this)"
    )
    parser.add_argument(
        "--record", action="store_true", help="write the baseline from this bundle instead of comparing"
    )
    add_quiet(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Compares, or records with --record; returns the exit code: 0, 1 where something fell.

    Raises InputError where nothing can be compared, and what ``score`` raises.
    """
    baseline = None if args.record else load(args.baseline)
    default = SEEDS if baseline is None else range(*baseline.seeds)
    options = options_from(Options, args, seeds=default if args.seeds is None else args.seeds)
    if baseline is None:
        return _record(args, options)
    check_comparable(baseline, options.seeds, args.tolerance)
    now = measure_bundle(options, progress=not args.quiet)
    lines = compare(baseline, now, args.tolerance)
    ok = all(line.ok for line in lines)
    if args.json:
        report = {
            "ok": ok,
            "verdict": verdict(lines, args.tolerance),
            "tolerance": args.tolerance,
            "seeds": now.seeds,
            "measures": [asdict(line) for line in lines],
            "baseline": _about(baseline),
            "now": _about(now),
        }
        print(json.dumps(report))
    else:
        print(f"{_title(now)}, held to {_title(baseline)}; {len(options.seeds)} requests a row; in percent:")
        print(table(lines))
        print(verdict(lines, args.tolerance))
    return 0 if ok else 1


def _record(args: argparse.Namespace, options: Options) -> int:
    path = check_output(args.baseline, (".json",))
    scores = measure_bundle(options, progress=not args.quiet)
    write_json(path, asdict(scores))
    if args.json:
        print(json.dumps({"recorded": str(path), "seeds": scores.seeds, **_about(scores), **scores.shares}))
        return 0
    print(f"{path}: {_title(scores)}; {len(options.seeds)} requests a row; in percent:")
    for row, shares in scores.shares.items():
        print(f"{row:16}" + ", ".join(f"{name} {percent(share)}" for name, share in shares.items()))
    return 0


def _about(scores: Scores) -> dict[str, Any]:
    names = ("bundle", "precision", "settings", "versions")
    return {name: getattr(scores, name) for name in names}


def _title(scores: Scores) -> str:
    settings = scores.settings
    how = f"{settings.get('solver')}, {settings.get('steps')} steps, guidance {settings.get('guidance')}"
    return f"{scores.bundle} ({scores.precision}, {how})"
