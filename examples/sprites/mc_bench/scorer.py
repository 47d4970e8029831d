"""A small network that stands where CLIP and DINO stand in MC-Bench: it embeds pictures, crops and words.

It shares nothing with the models that it judges: its own trunk, its own words, its own training on looks that
are not held out. Its embedding ``look`` answers as DINO's (whose look is it?), ``named`` as CLIP's (what is
it called, what is told of it?).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptmaster.engine.checkpoints.safetensors_io import load, load_strict

from ..world.vocabulary import KNOWN

SIDE = 32
"""Side of what the trunk sees, in pixels: crops of sprites and whole frames alike."""
WIDTHS = (32, 64, 96)
EMBEDDING = 96
LONGEST = 48
"""Words of the longest caption that is read."""


@functools.cache
def words() -> dict[str, int]:
    """The world's words, numbered from 1; 0 is any other word, and none."""
    phrases = [*KNOWN["words"], *KNOWN["labels"], *(p for kind in KNOWN["phrases"].values() for p in kind)]
    found = sorted({word for phrase in (*phrases, "third") for word in phrase.split()})
    return {word: number for number, word in enumerate(found, 1)}


def numbers_of(texts: Sequence[str]) -> Tensor:
    """Texts as numbers of words, int64 [n,LONGEST]."""
    rows = [[words().get(word, 0) for word in text.replace(",", " ").split()][:LONGEST] for text in texts]
    return torch.tensor([row + [0] * (LONGEST - len(row)) for row in rows])


class Block(nn.Module):
    """Half the size, then a residual step of the same width."""

    def __init__(self, width: int, to: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, to, 3, stride=2, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, to) for _ in range(2))
        self.inner = nn.Conv2d(to, to, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[n,C,s,s] -> [n,C',s/2,s/2]."""
        x = self.down(x)
        x = x + self.inner(F.gelu(self.norms[0](x)))
        return F.gelu(self.norms[1](x))


class Scorer(nn.Module):
    """Pictures and words to unit vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(Block(a, b) for a, b in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True)))
        self.look, self.named = (nn.Linear(16 * WIDTHS[-1], EMBEDDING) for _ in range(2))
        self.words = nn.Embedding(len(words()) + 1, EMBEDDING)
        self.places = nn.Parameter(0.02 * torch.randn(LONGEST, EMBEDDING))
        self.near = nn.Conv1d(EMBEDDING, EMBEDDING, 5, padding=2)
        self.told = nn.Linear(EMBEDDING, EMBEDDING)
        self.scales = nn.Parameter(torch.full((3,), 2.5))  # of looks, labels, captions; in training only

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures in 0..1 [n,3,SIDE,SIDE] -> look and named, unit vectors [n,EMBEDDING] each."""
        seen = self.trunk(4 * (pictures - 0.5)).flatten(1)  # [n,16·C]
        return F.normalize(self.look(seen), dim=-1), F.normalize(self.named(seen), dim=-1)

    def read(self, numbers: Tensor) -> Tensor:
        """Words [n,LONGEST] -> unit vectors [n,EMBEDDING]."""
        there = (numbers > 0)[..., None]
        told = (self.words(numbers) + self.places) * there  # [n,LONGEST,EMBEDDING]
        told = told + F.gelu(self.near(told.mT)).mT * there
        mean = told.sum(1) / there.sum(1).clamp(min=1)
        return F.normalize(self.told(mean), dim=-1)


def shrunk(pictures: Tensor) -> Tensor:
    """Pictures [n,3,H,W] in 0..1 as the trunk sees them."""
    return F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)


def open_scorer(path: Path) -> Scorer:
    """The scorer that was trained. Raises as ``load``."""
    scorer = Scorer()
    load_strict(scorer, load(path)[0])
    return scorer.eval().requires_grad_(False)


class _Reader:
    """Pictures in, vectors out, as MC-Bench asks for them."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @torch.no_grad()
    def _both(self, pictures: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        small = [shrunk(torch.from_numpy(p.copy()).permute(2, 0, 1)[None].float() / 255) for p in pictures]
        return self.scorer(torch.cat(small))


class Looks(_Reader):
    """In DINO's place."""

    def pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [H,W,3] each -> unit rows [n,EMBEDDING]."""
        return self._both(pictures)[0].numpy()


class Names(_Reader):
    """In CLIP's place."""

    def pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [H,W,3] each -> unit rows [n,EMBEDDING]."""
        return self._both(pictures)[1].numpy()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Captions or labels -> unit rows [n,EMBEDDING]."""
        return self.scorer.read(numbers_of(texts)).numpy()
