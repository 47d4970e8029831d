"""All units of an output folder as one JSON, and the three tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster.errors import InputError

from .judging import of_one_noun
from .rows import OURS, ROWS, Row
from .statistics import Estimate, Scores, differences, drawn_means, interval, order
from .unit import MAIN, MEASURES, gaps, read, result_of

SEEDS = 3
"""Least number of seeds of either row of which a difference is claimed."""
TABLES = {
    1: "Systems",
    2: "How concepts enter the transformer",
    3: "How pictures are bound to labels",
}
MARKED = ("tables", "curves")
"""What a document has marks for."""

Results = dict[str, list[dict[str, Any]]]
"""By row, the content of the ``result.json`` of each of its units, by seed."""


def finished(output: Path) -> Results:
    """What lies in an output folder; a row without any unit has an empty list. Raises InputError for a
    damaged one."""
    found: Results = {}
    for row in ROWS:
        named = f"{row.name}-"
        paths = [path for path in output.glob(f"{named}*") if path.name.removeprefix(named).isdecimal()]
        units = [unit for path in paths if (unit := result_of(path)) is not None]
        found[row.name] = sorted(units, key=lambda unit: unit["seed"])
    return found


def scores(units: Sequence[Mapping[str, Any]], measure: str) -> Scores:
    """Of a row's units, float64 [seeds,requests]."""
    return np.stack([read(unit["requests"][measure]) for unit in units])


def tables(found: Results) -> str:
    """The three tables, with what separates and the order."""
    return "\n\n".join(_table(number, found) for number in TABLES) + "\n"


def curves(found: Results) -> str:
    """How far each row's error with the right pictures lies below that with swapped ones, on the way."""
    watched = {row.name: [known for unit in found[row.name] if (known := gaps(unit))] for row in ROWS}
    each = [set(known) for units in watched.values() for known in units]
    # a unit that was stopped was watched there, too
    every = sorted(set.intersection(*each)) if each else []
    titles = ["", *(f"{number:,}" for number in every)]
    table = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for name, units in watched.items():
        if units:
            cells = [f"{1000 * np.mean([known[number] for known in units]):.1f}" for number in every]
            table.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    return "\n".join(table) + "\n"


def check_marks(document: str) -> None:
    """Raises InputError for a document that has not the marks between which `filled` writes."""
    for name in MARKED:
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if not 0 <= document.find(begin) < document.find(end):
            raise InputError(f"it must have the lines {begin.strip()!r} and {end!r}, as docs/paper.md has")


def filled(document: str, found: Results) -> str:
    """A document with tables and curves in the place of what stands between its marks."""
    for name, text in zip(MARKED, (tables(found), curves(found)), strict=True):
        before, _, rest = document.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        document = f"{before}<!-- {name} -->\n{text}{end}{after}"
    return document


def _table(number: int, found: Results) -> str:
    rows = [row for row in ROWS if number in row.tables]
    run = {row.name: scores(found[row.name], MAIN) for row in rows if found[row.name]}
    most = max((each.shape[1] for each in run.values()), default=0)
    whole = {name: each for name, each in run.items() if each.shape[1] == most}
    pairs = [(OURS.name, row.name) for row in rows if row != OURS]
    pairs += [(row.name, row.control_of) for row in rows if row.control_of is not None]
    apart = _apart(run, [pair for pair in pairs if run.keys() >= set(pair)])
    titles = ["", "DINO-I, v1", "DINO-I, v2", "margin", "ours less this", "pair binding, two nouns"]
    titles += ["one noun", "identity", "noun", "texture", "motion", "seeds", "training, s", "request, s"]
    lines = [f"**Table {number}. {TABLES[number]}**", "", "| " + " | ".join(titles) + " |"]
    lines.append("|" + " --- |" * len(titles))
    for row in rows:
        units = found[row.name]
        cells = [f"`{row.name}`: {row.title}", *(_paper(value) for value in row.paper)]
        if not units:
            lines.append("| " + " | ".join([*cells, "not run", *["–"] * (len(titles) - 4)]) + " |")
            continue
        mean = interval(run[row.name].mean(), drawn_means({row.name: run[row.name]})[row.name])
        cells += [_percent(mean), apart.get((OURS.name, row.name), "–")]
        cells += [_pair_binding(units, alike) for alike in (False, True)]
        cells += [f"{100 * scores(units, measure).mean():.1f}" for measure in MEASURES[2:]]
        seconds = [
            np.mean([unit[name] for unit in units]) for name in ("training_seconds", "seconds_per_request")
        ]
        cells += [str(len(units)), f"{seconds[0]:.0f}", f"{seconds[1]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    controls = [
        f"`{first}` less `{second}`: {text}." for (first, second), text in apart.items() if first != OURS.name
    ]
    return "\n".join([*lines, "", *controls, *_orders(rows, whole)])


def _pair_binding(units: Sequence[Mapping[str, Any]], alike: bool) -> str:
    """Of the requests of one noun, or of two."""
    found = scores(units, "pair_binding")
    asked = found[:, [of_one_noun(request) == alike for request in range(found.shape[1])]]
    return f"{100 * asked.mean():.1f}" if asked.size else "–"


def _paper(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: Estimate) -> str:
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _apart(run: Mapping[str, Scores], pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What lies between two rows, bold where it separates and both have as many seeds as tell it."""
    told = {}
    for pair, found in differences(run, pairs).items():
        text = f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        sure = min(len(run[name]) for name in pair) >= SEEDS
        told[pair] = f"**{text}**" if found.separates and sure else text
    return told


def _orders(rows: Sequence[Row], run: Mapping[str, Scores]) -> list[str]:
    """Kendall's tau against either version of the paper, where three rows or more have both."""
    lines = []
    for version in (0, 1):
        paper = {row.name: value for row in rows if (value := row.paper[version]) is not None}
        some = {name: each for name, each in run.items() if name in paper}
        if len(some) >= 3:
            tau = order(some, paper)
            told = f"{tau.value:.2f} [{tau.low:.2f}, {tau.high:.2f}]"
            lines.append(f"Kendall's tau with the paper's v{version + 1}, {len(some)} rows: {told}.")
    return lines
