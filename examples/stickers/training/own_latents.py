"""Latents as the model itself would have them: what it takes a noised clip for.

A sampler's last latents are an estimate, smoother than any clip's, and wrong where blocks meet. A decoder
that knows true ones alone shows that as it is.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from conceptmaster.examples.sprites.training.attention import cheapest_attention
from conceptmaster.examples.sprites.training.noising import normal

from ..world.scenes import Scene
from .artist import Artist
from .batches import Pool
from .options import Dropped, Supply
from .trainee import Trainee

SIGMAS = 0.35, 0.75
"""Noise levels at which the model is asked: those that the last of a few steps begin at."""
DRAWN = 1 << 46
"""First seed of pictures and noise."""


class OwnLatents:
    """What a model makes of clips that are noised. trainee: the model; artist: draws its pictures."""

    def __init__(self, trainee: Trainee, artist: Artist) -> None:
        self.trainee, self.artist = trainee.eval(), artist

    @torch.no_grad()
    def of(self, scene: Scene, number: int, latents: Tensor) -> Tensor:
        """The estimate, raw [1,Cz,F,H,W], of a scene's clip with these raw latents; its noise, pictures and
        level follow from ``number``."""
        device = self.artist.device
        drawn = self.artist.draw([scene], DRAWN + number, decoys=False)
        pool = Pool(lambda _: drawn, self.artist.config, Supply(1, 1, 1))
        pool.at(0)
        rng = np.random.default_rng((DRAWN, number))
        batch = pool.of(np.zeros(1, int), rng, Dropped(0, 0, 0))
        mean, deviation = pool.scale
        batch = dataclasses.replace(batch, latents=(latents - mean) / deviation)
        sigma = torch.full((1,), rng.uniform(*SIGMAS), device=device)
        noise = normal(rng, tuple(latents.shape), device)
        noisy = (1 - sigma) * batch.latents + sigma * noise
        with cheapest_attention(device):
            velocity = self.trainee.velocity(batch, noisy, sigma)[0].float()
        return (noisy - sigma * velocity) * deviation + mean
