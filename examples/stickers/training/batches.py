"""Training batches of the open world, out of clips that are there at a step.

What is left to chance is drawn on the CPU, which knows how many concepts every clip has: so nothing here asks
the device, and on a GPU nobody waits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.encoders import CLIP_MEAN, CLIP_STD
from conceptmaster.examples.sprites.training.batches import Tensors, sent, tokens_in

from ..world.scenes import MAX_CONCEPTS
from ..world.tokens import END_ID
from .boxing import Boxing, boxes_around
from .options import Dropped, Supply
from .placing import NOBODY, told_by_boxes

REFERENCES = 2
"""Reference pictures of every concept of a clip, of which a batch takes one."""
BARE = 0.05
"""Of a place in the latents concepts cover at most so much where it is background."""
FEW = 2
"""Concepts of a clip that has few."""
READ = "token_ids", "token_mask", "label_ids", "label_mask", "coverage", "motion"
"""What ``Captions`` has of what is told."""
SHARES = 0.22, 0.48, 0.22, 0.08
"""Of the clips of one, two, three and four concepts, as ``scenes.random_scene`` makes them."""


@dataclass
class Batch(Tensors):
    """One training batch; N slots, ``FEW`` or all, of which the first of every clip are filled.

    latents and decoys [B,Cz,F,H,W], token_ids/token_mask [B,T], pixels [B,N,3,px,px] (CLIP-normalised),
    label_ids/label_mask [B,N,L], concept_mask [B,N]: what is filled and not left out, filled int64 [M]: the
    filled ones of all B*N slots, coverage [B,N,F,H,W] in 0..1, portraits [B,N,3,32,32] in -1..1. track
    [B,N,F,4,4]: of the four video frames of each latent one (the first has one, four times), see
    ``Actor.track``. spot int64 [B,4], not by slots but as the caption tells them; see ``placing``. boxes bool
    [B,S,N]: which video token sees which concept, all of them where it has no box; see ``boxing``. A decoy is
    the same clip with other pictures.
    """

    latents: Tensor
    decoys: Tensor
    token_ids: Tensor
    token_mask: Tensor
    pixels: Tensor
    label_ids: Tensor
    label_mask: Tensor
    concept_mask: Tensor
    filled: Tensor
    coverage: Tensor
    portraits: Tensor
    track: Tensor
    spot: Tensor
    boxes: Tensor


@dataclass
class Captions(Tensors):
    """Sentences with their labels and what they tell; fields as in ``Batch``, and motion int64 [B,N] of
    ``MOTIONS``."""

    token_ids: Tensor
    token_mask: Tensor
    label_ids: Tensor
    label_mask: Tensor
    filled: Tensor
    coverage: Tensor
    motion: Tensor

    @classmethod
    def of(cls, told: dict[str, Tensor]) -> Self:
        """All of what ``Writer.told`` tells."""
        filled = torch.from_numpy(filled_slots(told["count"].numpy(), MAX_CONCEPTS))
        return cls(**{name: told[name] for name in READ}, filled=filled)


def filled_slots(counts: np.ndarray, slots: int) -> np.ndarray:
    """The numbers of those slots of all clips, ``slots`` of each, that so many concepts [B] fill: int64
    [M]."""
    return np.flatnonzero(np.arange(slots) < counts[:, None])


@functools.cache
def _clip_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(each, device=device)[:, None, None] for each in (CLIP_MEAN, CLIP_STD))
    return mean, std


def for_clip(pictures: Tensor) -> Tensor:
    """uint8 [...,3,px,px], normalised as CLIP wants it."""
    mean, std = _clip_scale(pictures.device)
    return (pictures.float() / 255 - mean) / std


class Ring:
    """What is there at a step, which follows from its number alone: ``draw(number)`` gives a block of tensors
    of ``supply.size`` rows, among them ``count`` on the CPU, the numbers of concepts."""

    def __init__(self, draw: Callable[[int], dict[str, Tensor]], supply: Supply) -> None:
        self.supply = supply
        self._draw, self._have = draw, -1
        self.held: dict[str, Tensor] = {}

    def at(self, step: int) -> None:
        """Have what is there at a step: draw what is missing."""
        newest = self.supply.blocks - 1 + step // self.supply.every
        for number in range(max(self._have + 1, newest - self.supply.blocks + 1), newest + 1):
            block, place = self._draw(number), number % self.supply.blocks
            for name, value in block.items():
                if name not in self.held:
                    shape = self.supply.blocks * self.supply.size, *value.shape[1:]
                    self.held[name] = torch.empty(shape, dtype=value.dtype, device=value.device)
                self.held[name][place * self.supply.size : (place + 1) * self.supply.size] = value
        self._have = newest

    @property
    def counts(self) -> np.ndarray:
        """The number of concepts of every row."""
        return self.held["count"].numpy()

    def some(self, rng: np.random.Generator, size: int, numbers: range) -> np.ndarray:
        """Random rows [size] of ``numbers`` concepts, as many of each as their share is: so always as many
        concepts. Where a ring lacks one of the numbers the others take its place."""
        kinds = [np.flatnonzero(self.counts == number) for number in numbers]
        shares = [SHARES[n - 1] * (len(kind) > 0) for n, kind in zip(numbers, kinds, strict=True)]
        ends = [0, *np.round(np.cumsum(shares) / sum(shares) * size).astype(int)]
        many = np.diff(ends)
        parts = [kind[rng.integers(len(kind), size=n)] for kind, n in zip(kinds, many, strict=True) if n]
        return np.concatenate(parts)


class Told(Ring):
    """Captions that are there at a step."""

    def captions(self, rng: np.random.Generator, size: int) -> Captions:
        """So many of them; all where there are no more."""
        whole = size == len(self.counts)
        rows = np.arange(size) if whole else self.some(rng, size, range(1, MAX_CONCEPTS + 1))
        device = self.held["token_ids"].device
        where = sent(rows, device)
        told = {name: self.held[name][where] for name in READ}
        return Captions(**told, filled=sent(filled_slots(self.counts[rows], MAX_CONCEPTS), device))


class Pool(Ring):
    """The clips that are there at a step; ``draw`` gives what ``Artist.paint`` gives of one block."""

    def __init__(self, draw: Callable[[int], dict[str, Tensor]], config: ModelConfig, supply: Supply) -> None:
        super().__init__(draw, supply)
        self.patch = config.transformer.patch_size
        self.scale = [
            torch.tensor(config.vae[name])[:, None, None, None] for name in ("latents_mean", "latents_std")
        ]

    def batch(
        self,
        rng: np.random.Generator,
        size: int,
        dropped: Dropped,
        frames: slice | None = None,
        apart: bool = True,
        boxing: Boxing | None = None,
    ) -> Batch:
        """A random batch, slots in random order, some captions and concepts left out; ``frames``: these
        latent frames alone, None for all. ``boxing``: of its clips; None: without boxes.

        ``apart``: clips of up to ``FEW`` concepts and of more have batches of their own, in proportion, as
        slots that nobody fills cost nearly as much as the others; else all batches have one shape.
        """
        kinds = [range(1, FEW + 1), range(FEW + 1, MAX_CONCEPTS + 1)]
        kinds = [kind for kind in kinds if np.isin(self.counts, kind).any()] if apart else []
        few = rng.random() < sum(SHARES[:FEW])
        numbers = kinds[0 if few else -1] if kinds else range(1, MAX_CONCEPTS + 1)
        return self.of(self.some(rng, size, numbers), rng, dropped, frames, boxing)

    def of(
        self,
        clips: np.ndarray,
        rng: np.random.Generator,
        dropped: Dropped,
        frames: slice | None = None,
        boxing: Boxing | None = None,
    ) -> Batch:
        """The batch of the clips of these numbers [B]. What is not of boxes is the same with them."""
        held, size, counts = self.held, len(clips), self.counts[clips]
        device = held["latents"].device
        self.scale = mean, deviation = [each.to(device) for each in self.scale]
        slots = FEW if counts.max() <= FEW else MAX_CONCEPTS
        chance = rng.random(size)
        edge = dropped.both + dropped.concepts
        no_concepts, no_caption = chance < edge, (chance >= edge) & (chance < edge + dropped.caption)
        no_caption |= chance < dropped.both
        # The filled slots in any order, and the others behind them.
        lots = rng.random((size, MAX_CONCEPTS)) + 2 * (np.arange(MAX_CONCEPTS) >= counts[:, None])
        places = lots.argsort(1)[:, :slots].copy()
        order = sent(places, device)
        which = sent(rng.integers(REFERENCES, size=(size, MAX_CONCEPTS))[:, :slots].copy(), device)
        rows, silent = sent(clips, device), sent(no_caption[:, None], device)
        shown = sent((np.arange(slots) < counts[:, None]) & ~no_concepts[:, None], device)
        spread = rows[:, None]
        frames = frames or slice(None)
        covered = held["coverage"][spread, order]  # [B,N,1+K,H,W]
        coverage = covered[:, :, frames]  # [B,N,F,H,W]
        grid = tuple(n // p for n, p in zip(coverage.shape[2:], self.patch, strict=True))
        boxes = torch.ones(size, int(np.prod(grid)), slots, dtype=torch.bool, device=device)
        token_ids, token_mask, spot = (held[name][rows] for name in ("token_ids", "token_mask", "spot"))
        if boxing is not None:
            # Without concepts there are none to have boxes, and the caption tells what it tells.
            boxed = boxing.concepts & (np.arange(MAX_CONCEPTS) < counts[:, None]) & ~no_concepts[:, None]
            loose = sent((boxing.loose & ~no_concepts)[:, None], device)
            room = sent(np.take_along_axis(boxing.room, places[..., None], 1), device)
            free = sent(~np.take_along_axis(boxed, places, 1)[:, None], device)  # [B,1,N]
            whole = sent(np.take_along_axis(boxing.whole, places, 1), device)
            boxes = tokens_in(boxes_around(covered, room, whole)[:, :, frames], grid) | free
            token_ids = torch.where(loose, held["loose_ids"][rows], token_ids)
            token_mask = torch.where(loose, held["loose_mask"][rows], token_mask)
            spot = told_by_boxes(spot, sent(boxed, device), loose)
        end = torch.arange(token_ids.shape[1], device=device) == 0  # of an empty sentence, its only token
        return Batch(
            (held["latents"][:, :, frames][rows].float() - mean) / deviation,
            (held["decoys"][:, :, frames][rows].float() - mean) / deviation,
            torch.where(silent, end * END_ID, token_ids),
            torch.where(silent, end, token_mask),
            for_clip(held["references"][spread, order, which]),
            held["label_ids"][spread, order],
            held["label_mask"][spread, order],
            shown,
            sent(filled_slots(counts, slots), device),
            coverage.float() / 255,
            held["portraits"][spread, order].float() / 127.5 - 1,
            by_latent_frame(held["track"])[:, :, frames][spread, order],
            torch.where(silent, NOBODY, spot),
            boxes,
        )


def by_latent_frame(track: Tensor) -> Tensor:
    """[B,N,1+4K,4] -> [B,N,1+K,4,4]."""
    first = track[:, :, :1].expand(-1, -1, 4, -1)[:, :, None]
    return torch.cat([first, track[:, :, 1:].unflatten(2, (-1, 4))], 2)
