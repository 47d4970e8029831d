"""Some frames of a clip instead of all: what a place looks like can be learned from two of them, at a
fraction of the cost, and what moves from the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from conceptmaster.engine.dit import ConceptDiT
from conceptmaster.engine.positions import Positions

from .batches import Batch


class _Window(nn.Module):
    """In the place of a transformer's positions: those of some latent frames of its own shape."""

    def __init__(self, positions: Positions, frames: slice) -> None:
        super().__init__()
        self.whole, self.frames = positions, frames

    def forward(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As of ``Positions``, for latents of these frames alone."""
        count = self.whole.config.latent_shape[1]
        whole = latents.new_zeros(*latents.shape[:2], count, *latents.shape[3:])
        whole[:, :, self.frames] = latents
        placed, rotary = self.whole(whole)
        cos, sin = (table.unflatten(0, (count, -1))[self.frames].flatten(0, 1) for table in rotary)
        return placed[:, :, self.frames], (cos, sin)


@contextmanager
def only(transformer: ConceptDiT, frames: slice | None) -> Iterator[None]:
    """Within it the transformer's latents are those of some latent frames, in their places; None: of all."""
    kept = transformer.positions
    if frames is not None:
        transformer.positions = _Window(kept, frames)  # type: ignore[assignment]
    try:
        yield
    finally:
        transformer.positions = kept


def cut(batch: Batch, frames: slice | None) -> Batch:
    """A batch with some of its latent frames; None: as it is."""
    if frames is None:
        return batch
    return replace(
        batch,
        latents=batch.latents[:, :, frames],
        decoys=batch.decoys[:, :, frames],
        coverage=batch.coverage[:, :, frames],
    )


def random_window(rng: np.random.Generator, frames: int, share: float, length: int) -> slice | None:
    """``length`` latent frames in a row of so many, or with a chance of 1 - ``share`` all, None."""
    if rng.random() >= share:
        return None
    first = int(rng.integers(frames - length + 1))
    return slice(first, first + length)
