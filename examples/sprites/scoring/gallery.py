"""Pictures of what a bundle does, good and bad: the first requests by seed, and the worst of many.

Nothing is chosen by taste: the first sheets show the seeds asked for, whatever comes out, and the last one
those requests of a search that lose most contests.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conceptmaster.errors import InputError
from conceptmaster.runtime.bundle_format.find import Bundle
from conceptmaster.runtime.cpus import usable

from ..arguments import add_options, add_quiet, options_from, seed_range
from ..world.requesting import make_folder
from .judging import ASKED, Generate, Result
from .score import Options, check_bundle, score
from .sheet import save_sheet, scored_row

SHEETS = {
    "two-concepts.png": (2, False),
    "same-noun.png": (2, True),
    "three-concepts.png": (3, False),
}
"""File to the number of concepts and whether two of them share their noun."""
FAILURES = "failures.png"
MOST_ROWS = 64
"""Of a sheet; all its videos are in memory at once."""

GALLERY = """\
Writes contact sheets of a bundle's requests: the pictures, then the true video, the generated one, and those
of the two controls, three frames each. two-concepts.png, same-noun.png and three-concepts.png show the first
requests by seed, never chosen; failures.png shows those of a search that lose most contests, worst first.
"""


def gallery(
    options: Options,
    folder: Path,
    *,
    search: range = range(100),
    failures: int = 6,
    generate: Generate | None = None,
    progress: bool = False,
) -> list[Path]:
    """Writes the sheets.

    Args: options: of which concepts, nouns and controls are set here; folder: made where it is missing;
    search: the seeds among which failures are looked for, with two different nouns; failures: how many are
    shown, 0 for no such sheet; generate: what is judged instead of the bundle; progress: show bars on
    standard error.

    Returns: the files, in order. Where no request of the search lost anything there is no ``failures.png``,
    and one of an earlier call is deleted. Raises InputError, OSError and what ``score`` raises.
    """
    if not 0 <= failures <= MOST_ROWS:
        raise InputError(f"failures must be 0 to {MOST_ROWS}, not {failures}")
    if len(options.seeds) > MOST_ROWS:
        raise InputError(f"a sheet shows at most {MOST_ROWS} seeds, not {len(options.seeds)}")
    wide = replace(options, seeds=search, concepts=2, same_noun=False, controls=False)
    if generate is None:
        check_bundle(Bundle.open(options.bundle).manifest)
    make_folder(folder)
    paths = []
    for name, (concepts, same_noun) in SHEETS.items():
        asked = replace(options, concepts=concepts, same_noun=same_noun, controls=True)
        _, results = score(asked, generate=generate, keep=len(asked.seeds), progress=progress)
        rows = [scored_row(asked.scene(result.seed), result) for result in results]
        save_sheet(rows, folder / name)
        paths.append(folder / name)
    if failures:
        _, results = score(wide, generate=generate, progress=progress)
        rows = []
        for seed, caption in worst(wide.scene, results)[:failures]:
            # once more, with the controls, which the search does without
            shown = replace(wide, seeds=range(seed, seed + 1), controls=True)
            _, again = score(shown, generate=generate, keep=1)
            rows.append(scored_row(shown.scene(seed), again[0], caption))
        if rows:
            save_sheet(rows, folder / FAILURES)
            paths.append(folder / FAILURES)
        else:
            (folder / FAILURES).unlink(missing_ok=True)
    return paths


def worst(scene_of: Callable[[int], Any], results: Sequence[Result]) -> list[tuple[int, str]]:
    """The requests that lost a contest as (seed, what was lost), most lost first, then by seed. scene_of: the
    scene of a seed, whose ``actors`` have labels."""
    found = []
    for result in results:
        lost, total, text = _lost(scene_of(result.seed), result)
        if lost:
            found.append((-lost, result.seed, f"seed {result.seed} lost {lost} of {total}: {text}"))
    return [(seed, caption) for _, seed, caption in sorted(found)]


def _lost(scene: Any, result: Result) -> tuple[int, int, str]:
    """How many contests the video as asked lost, of how many, and which, by concept."""
    won = result.won[ASKED]
    parts, count = [], 0
    for index, actor in enumerate(scene.actors):
        lost = [measure for measure, entries in won.items() if entries and not entries[index]]
        count += len(lost)
        if lost:
            parts.append(f"{actor.label}: {', '.join(lost)}")
    return count, sum(map(len, won.values())), "; ".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``gallery``."""
    parser.description = GALLERY
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder, made where it is missing"
    )
    parser.add_argument(
        "--seeds", type=seed_range, default=range(6), metavar="A:B", help="of the first sheets (0:6)"
    )
    add_options(parser, Options, "bundle", "device", "workers", workers=usable())
    parser.add_argument(
        "--search",
        type=seed_range,
        default=range(100),
        metavar="A:B",
        help="where to look for failures (0:100)",
    )
    parser.add_argument("--failures", type=int, default=6, metavar="N", help="how many, 0 for none (6)")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the sheets and prints their names; returns 0. Raises what ``gallery`` raises."""
    options = options_from(Options, args)
    paths = gallery(options, args.output, search=args.search, failures=args.failures, progress=not args.quiet)
    for path in paths:
        print(path)
    if args.failures and args.output / FAILURES not in paths:
        print(f"no request of {args.search.start}:{args.search.stop} lost a contest: no {FAILURES}")
    return 0
