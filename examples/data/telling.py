"""Which moving thing is which noun, by what the caption tells of place and motion: how names are found
without weights, which recognise nothing.

Of a noun's clause, from it to the next noun, is read "on the left", "at the top right", "in the middle", and
"moves left", "flies up", "stays still". One noun and one thing belong together unless the caption
contradicts. Of several, those that fit clearly better than in any other assignment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from .nouns import Noun

PLACE = re.compile(
    r"\b(?:at|on|in|to|near|from)\s+the\s+((?:(?:top|upper|bottom|lower|left|right|middle|centre|center)\b[\s-]*)+)",
    re.IGNORECASE,
)
WAY = re.compile(r"(?<!the )(?<!top )(?<!bottom )\b(left|right|up|down)(?:wards?)?\b", re.IGNORECASE)
STILL = re.compile(
    r"\b(?:still|motionless|waits|waiting|does not move|doesn't move|not moving)\b", re.IGNORECASE
)
ACROSS = {"left": 0.2, "right": 0.8, "middle": 0.5, "centre": 0.5, "center": 0.5}
DOWN = {"top": 0.2, "upper": 0.2, "bottom": 0.8, "lower": 0.8, "middle": 0.5, "centre": 0.5, "center": 0.5}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOVED = 0.06
"""Shares of the frame that a thing moves which is said to move somewhere, at least."""
WRONG_WAY = 0.5
"""What a motion that contradicts costs, in shares of the frame."""
ASTRAY = 0.4
"""Of all assignments the greatest cost of one noun that is no contradiction."""
MOST = 6
"""Nouns, and things, beyond which nothing is assigned."""


@dataclass(frozen=True)
class Told:
    """What a caption tells of a noun: where it is at first, 0 to 1 or None; its way, (0, 0) for still, or
    None."""

    across: float | None
    down: float | None
    way: tuple[int, int] | None


def told(caption: str, noun: Noun, nouns: list[Noun]) -> Told:
    """What the caption tells of a noun, in the clauses behind its mentions."""
    starts = sorted(start for other in nouns for start, _ in other.places)
    clauses = []
    for _, end in noun.places:
        behind = [start for start in starts if start > end]
        clauses.append(re.split(r"[.;!?]", caption[end : behind[0] if behind else None])[0])
    text = " | ".join(clauses)
    place, rest = PLACE.search(text), PLACE.sub(" ", text)
    words = re.findall(r"\w+", place[1].lower()) if place else []
    across = next((ACROSS[word] for word in words if word in ACROSS), None)
    down = next((DOWN[word] for word in words if word in DOWN), None)
    found = WAY.search(rest)
    way = (0, 0) if STILL.search(rest) else WAYS[found[1].lower()] if found else None
    return Told(across, down, way)


def cost(of: Told, first: np.ndarray, last: np.ndarray) -> float:
    """How badly a thing fits what is told, whose middles in its first and last frame are these, in shares of
    the frame: 0 fits, or nothing is told."""
    apart = [abs(at - told) for at, told in zip(first, (of.across, of.down), strict=True) if told is not None]
    total = float(max(apart, default=0.0))
    if of.way is not None:
        moved = last - first
        length = float(np.hypot(*moved))
        if of.way == (0, 0):
            total += WRONG_WAY * (length > MOVED)
        else:
            total += WRONG_WAY * (0.5 if length < MOVED else (1 - float(moved @ of.way) / length) / 2)
    return total


def assign(costs: np.ndarray, margin: float) -> tuple[dict[int, int], dict[int, str]]:
    """Things of nouns by costs [nouns,things]: the assignments that are clear, and why others are not."""
    nouns, things = costs.shape
    if not things:
        return {}, dict.fromkeys(range(nouns), "nothing moves")
    if max(nouns, things) > MOST:
        return {}, dict.fromkeys(range(nouns), "not told apart by the caption")
    if nouns <= things:
        ways = [dict(enumerate(way)) for way in permutations(range(things), nouns)]
    else:
        ways = [{n: t for t, n in enumerate(way)} for way in permutations(range(nouns), things)]
    totals = [sum(costs[n, t] for n, t in way.items()) for way in ways]
    best = ways[int(np.argmin(totals))]
    found, why = {}, {}
    for n in range(nouns):
        if n not in best:
            why[n] = "does not move"
            continue
        others = [total for way, total in zip(ways, totals, strict=True) if way.get(n) != best[n]]
        if min(others, default=np.inf) - min(totals) < margin:
            why[n] = "not told apart by the caption"
        elif costs[n, best[n]] > ASTRAY:
            why[n] = "the caption tells another place or motion"
        else:
            found[n] = best[n]
    return found, why
