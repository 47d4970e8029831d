"""What every measurement is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .card import Watch
from .timing import Say


@dataclass
class Job:
    """device: "cuda" or "cpu"; rounds: of what is timed; say: takes a line for people; found: is filled as it
    goes, so that what comes before a failure is kept; left: how many seconds there are still; small: whether
    sizes are those of a rehearsal; watch: reads clocks and watts."""

    device: str
    rounds: int
    say: Say = print
    found: dict[str, Any] = field(default_factory=dict)
    left: Callable[[], float] = lambda: math.inf
    small: bool = False
    watch: Watch = field(default_factory=Watch)
