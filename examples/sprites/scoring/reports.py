"""How scores are written: as JSON, and as tables for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from conceptmaster.atomic_write import replacing
from conceptmaster.errors import InputError
from conceptmaster.runtime.bundle_format import strict_json
from conceptmaster.untrusted import read_json

from .judging import ASKED, NO_CONCEPTS, SWAPPED
from .measures import MEASURES

Record = TypeVar("Record")


@dataclass(frozen=True)
class Row:
    """One way of sampling and what it reached, of a sweep.

    guidance: 1 is none; scores, standard_errors: by measure, 0..1; seconds_per_video: the median, where
    ``workers`` processes ran side by side.
    """

    solver: str
    steps: int
    guidance: float
    scores: dict[str, float]
    standard_errors: dict[str, float | None]
    seconds_per_video: float
    workers: int

    def __post_init__(self) -> None:
        if not set(MEASURES) <= self.scores.keys() & self.standard_errors.keys():
            raise ValueError("lacks a measure")

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells it from other rows, and their order: by solver and guidance, most steps first."""
        return self.solver, self.guidance, -self.steps

    def __str__(self) -> str:
        return f"{self.solver}, {self.steps} steps, guidance {self.guidance:g}"


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people to read too, whole or not at all. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(kind: type[Record], path: Path, name: str, remedy: str) -> Record:
    """The dataclass that ``write_json`` wrote. Raises InputError for a file that is missing or damaged, with
    the remedy."""
    try:
        return strict_json.decode(kind, read_json(path), name)
    except OSError as error:
        raise InputError(f"cannot read the {name} {str(path)!r}: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise InputError(f"bad {name}: {str(path)!r} {error}; {remedy}") from None


def percent(share: float | None, error: float | None = None) -> str:
    """A share, 0 to 1, with what it may be off by; an en dash for none."""
    if share is None:
        return "–"
    return f"{100 * share:.1f}" if error is None else f"{100 * share:.1f} ± {100 * error:.1f}"


def score_table(report: dict[str, Any]) -> str:
    """What ``score`` reports: a line per measure, a column per video, in percent with standard errors."""
    asked = "as asked" if report["source"] == "model" else report["source"]
    columns = {asked: ASKED, "no concepts": NO_CONCEPTS, "swapped": SWAPPED}
    shown = {title: name for title, name in columns.items() if report["noun" + name] is not None}
    lines = [
        f"{report['requests']} requests of {report['concepts']}, {report['seconds']:.1f} s; won, in percent:",
        f"{'':14}" + "".join(f"{title:>16}" for title in shown) + f"{'chance':>10}",
    ]
    for measure in MEASURES:
        if report[measure] is not None:
            names = [measure + name for name in shown.values()]
            cells = [percent(report[name], report["standard_errors"][name]) for name in names]
            chance = percent(report["chance"][measure])
            lines.append(f"{measure:14}" + "".join(f"{cell:>16}" for cell in cells) + f"{chance:>10}")
    return "\n".join(lines)
