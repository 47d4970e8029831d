"""How sure differences are: paired bootstrap over requests and seeds, and Kendall's tau with its interval.

Scores of a row are float64 [seeds,requests]; all rows have the same requests, from the same noise, so a draw
of requests is one for all of them. Seeds are those of a training: nothing pairs them, each row's are drawn
for itself. The mean of a few drawn seeds varies less than that of as many new trainings would, by (S - 1) / S
of its variance, so deviations between a row's seeds are widened by the root of S / (S - 1) (Davison and
Hinkley, Bootstrap Methods and their Application, 1997, 3.8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

DRAWS = 10_000
LEVEL = 0.95

Scores = np.ndarray
"""Of one row, float64 [seeds,requests]."""


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that holds it, at a level."""

    value: float
    low: float
    high: float

    @property
    def separates(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def drawn_means(rows: Mapping[str, Scores], draws: int = DRAWS, seed: int = 0) -> dict[str, np.ndarray]:
    """The mean of each row in every draw of the bootstrap, float64 [draws]."""
    rng, requests = np.random.default_rng(seed), next(iter(rows.values())).shape[1]
    counts, found = _drawn_requests(requests, draws, seed), {}
    for name, scores in rows.items():
        seeds = len(scores)
        each = scores.mean(1)  # [seeds]
        chosen = rng.integers(seeds, size=(draws, seeds))
        wider = (seeds / (seeds - 1)) ** 0.5 if seeds > 1 else 0.0
        found[name] = counts @ scores.mean(0) / requests + wider * (each - each.mean())[chosen].mean(1)
    return found


@cache
def _drawn_requests(requests: int, draws: int, seed: int) -> np.ndarray:
    """How often each request is drawn, float64 [draws,requests]."""
    rng = np.random.default_rng([seed, requests])
    return rng.multinomial(requests, np.full(requests, 1 / requests), size=draws).astype(np.float64)


def interval(value: float, drawn: np.ndarray, level: float = LEVEL) -> Estimate:
    """The percentile interval of what was drawn."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high))


def differences(
    rows: Mapping[str, Scores], pairs: Sequence[tuple[str, str]], draws: int = DRAWS, level: float = LEVEL
) -> dict[tuple[str, str], Estimate]:
    """Of each pair the first row's score less the second's, over the requests that both have, the first. The
    level is that of all of them together (Bonferroni): that any of the intervals is wrong has a chance of
    1 - ``level``."""
    found, each = {}, 1 - (1 - level) / max(len(pairs), 1)
    for pair in pairs:
        both = min(rows[name].shape[1] for name in pair)
        scores = {name: rows[name][:, :both] for name in pair}
        drawn = drawn_means(scores, draws)
        first, second = pair
        value = scores[first].mean() - scores[second].mean()
        found[pair] = interval(value, drawn[first] - drawn[second], each)
    return found


def kendall(first: Sequence[float], second: Sequence[float] | np.ndarray) -> np.ndarray:
    """Kendall's tau-b of ``first`` [n] with ``second`` [...,n]; NaN where either has only one value."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    left, right = np.triu_indices(len(a), 1)
    x, y = np.sign(a[left] - a[right]), np.sign(b[..., left] - b[..., right])  # [pairs], [...,pairs]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum() * (y * y).sum(-1))


def order(
    rows: Mapping[str, Scores], paper: Mapping[str, float], draws: int = DRAWS, level: float = LEVEL
) -> Estimate:
    """Kendall's tau between the paper's figures and the rows' means, over the rows that have both."""
    names = [name for name in rows if name in paper]
    theirs, drawn = [paper[name] for name in names], drawn_means(rows, draws)
    value = kendall(theirs, [rows[name].mean() for name in names])
    taus = kendall(theirs, np.stack([drawn[name] for name in names], -1))
    return interval(float(value), taus[np.isfinite(taus)], level)
