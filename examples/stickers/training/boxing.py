"""Boxes that some clips are learned with, so that what ships follows ``--box``: around what is drawn of a
concept, somewhat larger, and drawn over the video's tokens as the runtime draws those of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from conceptmaster.examples.sprites.training.batches import frame_boxes

from ..world.scenes import MAX_CONCEPTS

ROOM = 0.25
"""Most of its width, or height, by which a box is larger at a side than what is drawn."""
FREE = 0.2
"""Share of the concepts of such clips that have no box."""
LOOSE = 0.5
"""Share of such clips whose captions tell no places."""
WHOLE = 0.5
"""Share of the boxes that are one for all frames, as most users hand them in."""


@dataclass(frozen=True)
class Boxing:
    """What chance says of the boxes of B clips, on the CPU: whose captions tell no places, loose bool [B];
    which concepts have a box, in the order of their scene, concepts bool [B,4]; by which share of its size
    each is larger at left, top, right and bottom, room float32 [B,4,4]; and which are one for all frames,
    whole bool [B,4]."""

    loose: np.ndarray
    concepts: np.ndarray
    room: np.ndarray
    whole: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, size: int, share: float) -> Self:
        """Of so many clips, of which a ``share`` has boxes."""
        clips = rng.random(size) < share
        loose = clips & (rng.random(size) < LOOSE)
        concepts = clips[:, None] & (rng.random((size, MAX_CONCEPTS)) >= FREE)
        room = ROOM * rng.random((size, MAX_CONCEPTS, 4), np.float32)
        return cls(loose, concepts, room, rng.random((size, MAX_CONCEPTS)) < WHOLE)


def boxes_around(coverage: Tensor, room: Tensor, whole: Tensor) -> Tensor:
    """The box of what is drawn in each latent frame, or where ``whole`` in all of them, larger by shares of
    its size: coverage [B,N,F,H,W], room [B,N,4], whole bool [B,N] -> x0, y0, x1, y1 in 0..1, [B,N,F,4]; empty
    where nothing is drawn."""
    found, drawn = frame_boxes(coverage)
    low, high = found.split(2, -1)  # [B,N,F,2]
    one = whole[..., None, None]
    low = torch.where(one, torch.where(drawn, low, 1).amin(2, keepdim=True), low)
    high = torch.where(one, high.amax(2, keepdim=True), high)
    before, behind = room[:, :, None].split(2, -1)  # [B,N,1,2]
    size = high - low
    return torch.cat((low - before * size, high + behind * size), -1).clamp(0, 1)
