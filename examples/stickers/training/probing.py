"""Whether the pictures are looked at: the error where the concepts are, with them, without, and swapped."""

from __future__ import annotations

import numpy as np
import torch

from conceptmaster.examples.sprites.training.attention import cheapest_attention
from conceptmaster.examples.sprites.training.batches import Dropped

from .batches import Pool
from .trainee import Trainee

NOISE = 0.85


@torch.no_grad()
def probe(trainee: Trainee, pool: Pool, device: str, count: int) -> dict[str, float]:
    """Mean squared error of the velocity where the concepts are, at noise level ``NOISE``, on the first
    ``count`` clips of a pool of two-concept scenes. If the three are equal the pictures are ignored."""
    rng = np.random.default_rng(0)
    results: dict[str, list[float]] = {"with": [], "without": [], "swapped": []}
    for start in range(0, count, 32):
        batch = pool.of(np.arange(start, min(start + 32, count)), rng, Dropped(0, 0, 0)).to(device)
        noise = torch.from_numpy(rng.standard_normal(batch.latents.shape, np.float32)).to(device)
        sigma = torch.full((len(noise),), NOISE, device=device)
        noisy = (1 - NOISE) * batch.latents + NOISE * noise
        weight = batch.coverage.sum(1, keepdim=True).clamp(max=1)
        mask, pixels = batch.concept_mask, batch.pixels
        swapped = pixels.clone()
        for b in range(len(pixels)):
            filled = torch.nonzero(mask[b])[:, 0]
            swapped[b, filled] = pixels[b, filled.roll(1)]
        for name in results:
            batch.concept_mask = mask & (name != "without")
            batch.pixels = swapped if name == "swapped" else pixels
            with cheapest_attention(device):
                velocity = trainee.velocity(batch, noisy, sigma)[0]
            error = (velocity - (noise - batch.latents)).square() * weight
            results[name].append(float(error.mean() / weight.mean()))
    return {name: round(float(np.mean(values)), 4) for name, values in results.items()}
