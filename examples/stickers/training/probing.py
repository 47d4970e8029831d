"""Whether the pictures are looked at."""

from __future__ import annotations

import numpy as np

from conceptmaster.examples.sprites.training.probing import errors

from .batches import Pool
from .options import Dropped
from .trainee import Trainee


def probe(trainee: Trainee, pool: Pool, device: str, count: int) -> dict[str, float]:
    """What the sprites' ``probing.errors`` finds on the first ``count`` clips of a pool of two-concept
    scenes."""
    rng = np.random.default_rng(0)
    parts = (np.arange(start, min(start + 32, count)) for start in range(0, count, 32))
    batches = (pool.of(clips, rng, Dropped(0, 0, 0)).to(device) for clips in parts)
    return errors(lambda *asked: trainee.velocity(*asked)[0], batches, rng, device)
