"""One step shared out over ranks, processes with a GPU each: what of it is one rank's.

Guidance branches are parted first, since they have nothing to tell each other before the sum; what ranks are
left part the tokens (parts.py). Weights, and keys and values of text and concepts, are whole on every rank.

Letters: K guidance branches, of which this rank has K'; S video tokens (and those of pictures).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .blocks import KEYS_VALUES
from .parts import Exchange, Part


@dataclass(frozen=True)
class Share:
    """A rank's part of a step: the branches from `first` to before `last` of `branches`; and of their tokens
    those that `exchange` tells, None for all."""

    first: int
    last: int
    branches: int
    exchange: Exchange | None = None

    def of(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Its own of rows that are by branch, of all branches or of the last ones."""
        absent = self.branches - rows.shape[dim]
        first, last = (max(0, branch - absent) for branch in (self.first, self.last))
        return rows.narrow(dim, first, last - first)

    def conditions(self, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its own of what `Condition` gave, and of text_bias."""
        dims = {**dict.fromkeys(KEYS_VALUES, 1), "text_bias": 0}
        return {
            name: self.of(value, dims[name]) if name in dims else value for name, value in conditions.items()
        }

    def part(self, tokens: int, runs: int) -> Part | None:
        """Its own of so many tokens; None where it has all."""
        return None if self.exchange is None else Part(self.exchange, tokens, runs)

    def placed(self, x: Tensor) -> Tensor:
        """Its branches' rows where they are among all, which are zero elsewhere: [K',…] -> [K,…]."""
        whole = x.new_zeros(self.branches, *x.shape[1:])
        whole[self.first : self.last] = x
        return whole


def split(ranks: int, branches: int, heads: int) -> tuple[int, int] | None:
    """Into how many parts so many ranks cut the branches, and then the tokens; None where the heads do not
    divide."""
    groups = math.gcd(ranks, branches)
    parts = ranks // groups
    return None if heads % parts else (groups, parts)
