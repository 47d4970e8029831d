"""Some frames of a clip instead of all: what a place looks like can be learned from two of them, at a
fraction of the cost, and what moves from the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from conceptmaster.engine.dit import ConceptDiT
from conceptmaster.engine.positions import Positions


class _Window(nn.Module):
    """In the place of a transformer's positions: those of some latent frames of its own shape."""

    def __init__(self, positions: Positions, frames: slice) -> None:
        super().__init__()
        self.whole, self.frames = positions, frames

    def forward(self, latents: Tensor, square: int | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As of ``Positions``, for latents of these frames alone; ``square`` is None."""
        whole, frames = self.whole, self.frames
        planes = whole.planes[:, :, frames].to(latents.dtype).expand(len(latents), -1, -1, -1, -1)
        count = whole.planes.shape[2]
        cos, sin = (table.unflatten(0, (count, -1))[frames].flatten(0, 1) for table in (whole.cos, whole.sin))
        return torch.cat([latents, planes], dim=1), (cos, sin)


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


def random_window(rng: np.random.Generator, frames: int, share: float, length: int) -> slice | None:
    """``length`` latent frames in a row of so many, or with a chance of 1 - ``share`` all, None."""
    if rng.random() >= share:
        return None
    first = int(rng.integers(frames - length + 1))
    return slice(first, first + length)
