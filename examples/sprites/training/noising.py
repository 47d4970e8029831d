"""What clips are noised with in training: levels, and noise that leads to their decoys."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from conceptmaster.engine.dit import MIN_SIGMA

from .batches import Batch, generator, sent

FOREGROUND = 3.0
"""Extra weight of the loss where a concept is."""
HELD_SIGMA = 0.2
"""Where nothing else is said, the level below which the loss counts the data's error."""
HIGH_SIGMAS = 0.9, 1.0
"""Levels at which little can be read from a clip (at 0.9 its background in one case of four, at 0.98 hardly
ever): what its caption says is there to follow."""
DECOY_SIGMAS = 0.3, 1.0
"""Noise levels at which a clip may go on from its decoy: what the last steps of a sampler see, too."""
DECOY_HELD = 0.6
"""Below it the loss of such a clip counts the data's error: nothing of the true texture is there to copy."""


def normal(rng: np.random.Generator, shape: tuple[int, ...], device: str) -> Tensor:
    """Normal noise, float32, drawn where it is used; it follows from the state of ``rng``, which moves on."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(rng.standard_normal(shape, np.float32))
    return torch.randn(shape, generator=generator(rng, device), device=device)


def decoy_noise(
    batch: Batch, noise: Tensor, sigma: Tensor, rng: np.random.Generator, share: float
) -> tuple[Tensor, Tensor]:
    """The noise, with the decoy's difference to the clip in that of a ``share`` of the clips that have
    concepts and a level ``sigma`` [B] in ``DECOY_SIGMAS``; and which these are, bool [B]. Noised by it they
    are their decoys, noised, and what has to be told is still the clip."""
    chosen = sent(rng.random(len(sigma), np.float32) < share, sigma.device)
    chosen &= batch.concept_mask.any(-1) & (sigma >= DECOY_SIGMAS[0]) & (sigma <= DECOY_SIGMAS[1])
    s = torch.where(chosen, sigma, 1.0)[:, None, None, None, None]
    return noise + (1 - s) / s * (batch.decoys - batch.latents), chosen


def random_sigma(rng: np.random.Generator, size: int, device: str = "cpu", high: float = 0.0) -> Tensor:
    """Noise levels float32 [size] on a device, more often high: 1 - sigmoid(1.2 n - 0.7); a share ``high`` of
    them in ``HIGH_SIGMAS``, which one in ten of the others reaches, and half of that share noise alone."""
    levels = 1 / (1 + np.exp(1.2 * rng.standard_normal(size, np.float32) - 0.7))
    if high:
        low, top = HIGH_SIGMAS
        near = np.minimum(low + 2 * (top - low) * rng.random(size), top)
        levels = np.where(rng.random(size) < high, near, levels)
    return sent(levels.astype(np.float32), device)


def noised(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Latents [B,Cz,F,H,W] at the levels ``sigma`` [B]."""
    s = sigma[:, None, None, None, None]
    return (1 - s) * latents + s * noise


def flow_loss(
    velocity: Tensor,
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    coverage: Tensor,
    held: Tensor | float,
    foreground: float = FOREGROUND,
    channels: Tensor | None = None,
) -> Tensor:
    """The squared error of a velocity [B,Cz,F,H,W], which counts for more where a concept is: ``coverage``
    [B,N,F,H,W] in 0..1.

    Below the level ``held`` [B], or one for all, it counts the data's error, not the velocity's, which is
    1/sigma times that: held, lest copying be all that is learned, or what cannot be known any more be all
    that counts. foreground: how much more a concept counts; channels: what each latent channel counts for,
    [Cz], all alike where it is None.
    """
    s = sigma[:, None, None, None, None]
    held = torch.as_tensor(held, device=s.device).expand(len(s))[:, None, None, None, None]
    weight = 1 + foreground * coverage.sum(1, keepdim=True).clamp(max=1)  # [B,1,F,H,W]
    counted = s.clamp(min=MIN_SIGMA) / torch.maximum(s, held)
    error = (velocity.float() - (noise - latents)).square() * weight * counted.square()
    if channels is not None:
        error = error * channels[:, None, None, None]
    return error.mean() / weight.mean()
