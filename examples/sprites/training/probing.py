"""Whether the pictures are looked at: the error where the concepts are, with them, without, and swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import cheapest_attention

NOISE = 0.85


@torch.no_grad()
def errors(
    velocity: Callable[[Any, Tensor, Tensor], Tensor],
    batches: Iterable[Any],
    rng: np.random.Generator,
    device: str,
) -> dict[str, float]:
    """Mean squared error of the velocity where the concepts are, at noise level ``NOISE``: with the concepts,
    without, and with pictures swapped. If the three are equal the pictures are ignored.

    ``velocity(batch, noisy, sigma)`` is that of a batch of any world's; ``rng``, which may also draw the
    batches, draws the noise of each when it has come.
    """
    results: dict[str, list[float]] = {"with": [], "without": [], "swapped": []}
    for batch in batches:
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
            with cheapest_attention(device), torch.compiler.set_stance("force_eager"):
                found = velocity(batch, noisy, sigma)
            error = (found - (noise - batch.latents)).square() * weight
            results[name].append(float(error.mean() / weight.mean()))
    return {name: round(float(np.mean(values)), 4) for name, values in results.items()}
