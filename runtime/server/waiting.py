"""Which jobs wait, in the order in which they came: of each bundle, and of each owner."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .jobs import Job


class Waiting:
    """Jobs that nobody makes yet. A job's number tells when it came, and stays."""

    def __init__(self) -> None:
        self._lines: defaultdict[str, list[int]] = defaultdict(list)  # numbers, sorted
        self._owned: defaultdict[str, dict[str, tuple[int, str]]] = defaultdict(dict)

    def add(self, number: int, job: Job) -> None:
        """It waits, once more or for the first time."""
        insort(self._lines[job.bundle], number)
        self._owned[job.owner][job.id] = (number, job.bundle)

    def remove(self, number: int, job: Job) -> None:
        """It does not wait any more."""
        line = self._lines[job.bundle]
        del line[bisect_left(line, number)]
        owned = self._owned[job.owner]
        del owned[job.id]
        if not owned:
            del self._owned[job.owner]

    def count(self, owner: str | None = None) -> int:
        """How many, of all or of one owner."""
        return sum(map(len, self._lines.values())) if owner is None else len(self._owned.get(owner, ()))

    def place(self, number: int, bundle: str) -> int:
        """How many of the same bundle are before it."""
        return bisect_left(self._lines[bundle], number)

    def places(self, owner: str) -> dict[str, int]:
        """`place` of all of an owner's."""
        return {id: self.place(*where) for id, where in self._owned.get(owner, {}).items()}

    def bundles(self, owner: str) -> set[str]:
        """For which an owner's jobs wait."""
        return {bundle for _, bundle in self._owned.get(owner, {}).values()}
