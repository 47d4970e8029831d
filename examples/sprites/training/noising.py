"""What clips are noised with in training: levels, and noise that carries the model's own errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .batches import Batch, generator

if TYPE_CHECKING:
    from .train_model import Trainee

HELD_SIGMA = 0.2
"""Where nothing else is said, the level below which the loss counts the data's error."""
HIGH_SIGMAS = 0.75, 1.0
"""Where it is decided which way a texture runs: below, it is read off the clip."""
DECOY_SIGMAS = 0.3, 1.0
"""Noise levels at which a clip may go on from its decoy: what the last steps of a sampler see, too."""
DECOY_HELD = 0.6
"""Below it the loss of such a clip counts the data's error: nothing of the true texture is there to copy."""
OWN_SIGMAS = 0.65, 1.0
"""Noise levels at which the model's own estimate is made, for clips that go on from it."""


def normal(rng: np.random.Generator, shape: tuple[int, ...], device: str) -> Tensor:
    """Normal noise, float32, drawn where it is used; it follows from the state of ``rng``, which moves on."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(rng.standard_normal(shape, np.float32))
    return torch.randn(shape, generator=generator(rng, device), device=device)


@torch.no_grad()
def own_noise(
    trainee: Trainee, batch: Batch, noise: Tensor, sigma: Tensor, rng: np.random.Generator, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise and noise levels like those given, with the model's own errors in the noise of a ``share`` of the
    clips that have concepts; and the level [B] that a clip was told at, ``HELD_SIGMA`` for the others.

    Such a clip is noised to a level of ``OWN_SIGMAS``, told by the model, and noised again to a lower level;
    the noise returned is what leads there from the true clip. Where a sample is at that level when the model
    generates, what it drew before has no pattern yet; true clips have it even where noise hides it from the
    eye, so that from them alone the model learns to read patterns off the clip, never off the pictures.
    """
    least, most = OWN_SIGMAS
    chosen = torch.from_numpy(rng.random(len(sigma), np.float32) < share).to(sigma.device)
    chosen &= batch.concept_mask.any(-1)
    if share == 0 or not chosen.any():
        return noise, sigma, torch.full_like(sigma, HELD_SIGMA)
    first = torch.from_numpy(rng.uniform(least, most, len(sigma)).astype(np.float32)).to(sigma.device)
    again = normal(rng, tuple(noise.shape), str(sigma.device))
    part, s = batch[chosen], first[chosen, None, None, None, None]
    noisy = (1 - s) * part.latents + s * noise[chosen]
    told = noisy - s * trainee.velocity(part, noisy, first[chosen])[0].float()
    # Between the level that it was told at and a third of it.
    lower = torch.from_numpy(rng.uniform(1 / 3, 1, len(sigma)).astype(np.float32)).to(sigma.device)
    noise, sigma = noise.clone(), torch.where(chosen, first * lower, sigma)
    s = sigma[chosen, None, None, None, None]
    noise[chosen] = again[chosen] + (1 - s) / s * (told - part.latents)
    return noise, sigma, torch.where(chosen, first, HELD_SIGMA)


def decoy_noise(
    batch: Batch, noise: Tensor, sigma: Tensor, rng: np.random.Generator, share: float
) -> tuple[Tensor, Tensor]:
    """The noise, with the decoy's difference to the clip in that of a ``share`` of the clips that have
    concepts and a level ``sigma`` [B] in ``DECOY_SIGMAS``; and which these are, bool [B]. Noised by it they
    are their decoys, noised, and what has to be told is still the clip."""
    chosen = torch.from_numpy(rng.random(len(sigma), np.float32) < share).to(sigma.device)
    chosen &= batch.concept_mask.any(-1) & (sigma >= DECOY_SIGMAS[0]) & (sigma <= DECOY_SIGMAS[1])
    if not chosen.any():
        return noise, chosen
    s = torch.where(chosen, sigma, 1.0)[:, None, None, None, None]
    return noise + (1 - s) / s * (batch.decoys - batch.latents), chosen


def random_sigma(rng: np.random.Generator, size: int, high: float = 0.0) -> Tensor:
    """Noise levels [size], more often high: 1 - sigmoid(1.2 n - 0.7); a share ``high`` of them uniform in
    ``HIGH_SIGMAS``."""
    levels = 1 / (1 + np.exp(1.2 * rng.standard_normal(size, np.float32) - 0.7))
    if high:
        levels = np.where(rng.random(size) < high, rng.uniform(*HIGH_SIGMAS, size), levels)
    return torch.from_numpy(levels.astype(np.float32))
