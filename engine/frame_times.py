"""A time for each latent frame, in the place of one for the whole video: what differs between the two.

Wan2.2's TI2V-5B gives each token a time, of which there are two, since a given picture is a whole latent
frame that is never noisy. So a latent frame has one, and modulation is [K,f,6,D] instead of [K,6,D].

Letters: K guidance branches, F latent frames (f of patches), S video tokens, D width, Cz latent channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scaled(x: Tensor, factor: Tensor, offset: Tensor | None = None) -> Tensor:
    """x [K,S,D] * factor + offset, each [K or 1,1,D], or [K or 1,f,1,D] where each of f latent frames has its
    own."""
    if factor.dim() == x.dim():
        return x * factor if offset is None else x * factor + offset
    frames = x.unflatten(1, (factor.shape[1], -1))  # [K,f,S/f,D]
    return (frames * factor if offset is None else frames * factor + offset).flatten(1, 2)


def with_clean(latents: Tensor, time: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
    """The latents with a picture as their first frame, and each frame's time: 0 of that one, as diffusers'
    pipelines do it where they expand time steps. The mask is one where there is a picture, or zero
    everywhere: then all is as it was.

    latents [K,Cz,F,H,W], time [K], picture [K or 1,1+Cz,1,H,W] (mask, latents) -> [K,Cz,F,H,W], [K,F].
    """
    mask, clean = picture.split([1, latents.shape[1]], dim=1)
    first, rest = latents.split([1, latents.shape[2] - 1], dim=2)
    known = torch.cat((mask * clean + (1 - mask) * first, rest), dim=2)  # [K,Cz,F,H,W]
    times = time[:, None] * (1 - F.pad(mask[:, 0, 0, 0, :1].type_as(time), (0, rest.shape[2])))  # [K,F]
    return known, times
