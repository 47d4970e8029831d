"""What all parts of a run share: the shapes, the report that they fill, and the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .card import Watch
from .case import Shapes
from .job import Job
from .model import SMALL, Size
from .timing import Say

ROUNDS = 30
MODEL_ROUNDS = 4


@dataclass
class Setting:
    """report: is filled as parts go on; left: how many seconds there are still; scratch: a folder for
    gigabytes that nobody keeps."""

    shapes: Shapes
    report: dict[str, Any]
    left: Callable[[], float]
    say: Say
    scratch: Path
    watch: Watch = field(default_factory=Watch)

    @property
    def size(self) -> Size:
        """Of the model and its video."""
        return SMALL if self.shapes.small else Size()

    def job(self, name: str, rounds: int = MODEL_ROUNDS) -> Job:
        """For a measurement that fills the report's entry `name`; rounds: at most."""
        found = self.report.setdefault(name, {})
        s = self.shapes
        return Job(s.device, min(ROUNDS, rounds), self.say, found, self.left, s.small, self.watch)

    def red(self, kernels: tuple[str, ...], size: str = "1.3B") -> list[str]:
        """Which of these kernels, by the beginning of their names, are red at sizes that begin with `size`;
        where nothing was checked, none."""
        wrong = [name for name, row in self.report.get("cases", {}).items() if not row["ok"]]
        of_size = [name for name in wrong if f", {size}" in name or name.endswith(", small")]
        return [name for name in of_size if name.startswith(kernels)]
