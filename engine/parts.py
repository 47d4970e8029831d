"""A video's tokens parted among ranks, processes with a GPU each.

Everything in a block is done token by token, but for self-attention: around it each rank gives its tokens of
other heads away and gets all tokens of its own heads (DeepSpeed Ulysses, Jacobs et al., arXiv 2309.14509).

Tokens are cut in each of their `runs` by itself, as many as modulation has vectors (of a video whose first
frame is clean, the latent frames): so every rank has as many runs, and vectors fit as they are. Where a run
does not divide it is padded at its end; nobody ever attends to padding.

Letters: K guidance branches, S video tokens (and those of pictures), S' one rank's, A heads, E head width, u
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Exchange(Protocol):
    """The ranks that have the same branches, and each a part of the tokens."""

    rank: int
    """This one's place among them."""
    size: int

    def turn(self, pieces: Tensor) -> Tensor:
        """Gives pieces[i] to rank i and gets one from each, in their order: [size,…] -> [size,…]."""


@dataclass(frozen=True)
class Part:
    """This rank's of `tokens` tokens in `runs` equal runs."""

    exchange: Exchange
    tokens: int
    runs: int = 1

    @property
    def piece(self) -> int:
        """How many of each run are one rank's, with padding."""
        return -(-self.tokens // self.runs // self.exchange.size)

    def own(self, x: Tensor) -> Tensor:
        """[K,S,…] -> this rank's, [K,S',…]; padding is zero."""
        first = self.exchange.rank * self.piece
        return self._padded(x)[:, :, first : first + self.piece].flatten(1, 2)

    def placed(self, x: Tensor) -> Tensor:
        """This rank's [K,S',…] where they are among all, [K,S,…], which are zero elsewhere."""
        whole = x.new_zeros(len(x), self.runs, self.exchange.size, self.piece, *x.shape[2:])
        whole[:, :, self.exchange.rank] = x.unflatten(1, (self.runs, self.piece))
        return self._cut(whole.flatten(2, 3))

    def by_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Of all heads this rank's tokens, [K,S',A,E] each -> of its heads all tokens, [K,S,A/u,E] each."""
        ranks = self.exchange.size
        heads = [part.unflatten(2, (ranks, -1)).movedim(2, 0) for part in parts]  # [u,K,S',A/u,E] each
        found = self.exchange.turn(torch.stack(heads, dim=1))  # [u,…], now of each rank's tokens
        found = found.unflatten(3, (self.runs, self.piece)).movedim(0, 3)  # [parts,K,runs,u,piece,A/u,E]
        return tuple(self._cut(part) for part in found.flatten(3, 4).unbind())

    def by_tokens(self, x: Tensor) -> Tensor:
        """The way back: of this rank's heads all tokens, [K,S,A/u,E] -> of all heads its own, [K,S',A,E]."""
        pieces = self._padded(x).unflatten(2, (self.exchange.size, self.piece)).movedim(2, 0)
        found = self.exchange.turn(pieces.flatten(2, 3).contiguous())  # [u,K,S',A/u,E], now of each's heads
        return found.movedim(0, 2).flatten(2, 3)

    def _padded(self, x: Tensor) -> Tensor:
        """[K,S,…] -> [K,runs,ranks * piece,…]."""
        x = x.unflatten(1, (self.runs, -1))
        missing = self.exchange.size * self.piece - x.shape[2]
        return F.pad(x, (*(0, 0) * (x.dim() - 3), 0, missing)) if missing else x

    def _cut(self, x: Tensor) -> Tensor:
        """[K,runs,ranks * piece,…] -> [K,S,…]."""
        return x[:, :, : self.tokens // self.runs].flatten(1, 2)
