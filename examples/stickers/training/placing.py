"""Where a caption tells no place the noise does: a sampler of few steps cannot make up its mind otherwise.

From noise alone a model gives the mean of all that could follow. Of a thing that may be anywhere this is a
haze all over, and four steps are too few for one place to win. So clips without told places get noise that
says them: of the ninths of a frame the brightest in the noise is the first such concept's, the next the
second's. Everything else of the noise stays by chance, and as any ninth is as likely as another, the noise of
all clips together is normal, as a sampler's is (minibatch couplings, arXiv 2302.00482, choose noise by clips,
too).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..world.scenes import SIDE, Actor

NOBODY = -1
"""The spot of a concept that is not there."""
CHANNELS = 4
"""Of the latents, the first, in which noise is bright or not."""
NINTHS = 9
"""Spots; a concept whose place is told has ``NINTHS`` and more."""
EDGES = 0.34375, 0.65625
"""Where the three columns, or rows, part: of a latent's eight, behind the third and before the sixth."""


def spot_of(actor: Actor) -> int:
    """The ninth in which a concept is at first, row by row; ``NINTHS`` more where its place is told."""
    column, row = (sum(at / SIDE > edge for edge in EDGES) for at in actor.start)
    return 3 * row + column + (0 if actor.cell is None else NINTHS)


def told_by_boxes(spot: Tensor, boxed: Tensor, loose: Tensor) -> Tensor:
    """Spots int64 [B,N] where boxes tell the places of some concepts, bool [B,N], and some clips' captions,
    bool [B,1], those of none. The noise of a request does not know of its boxes: so places that they tell are
    told, whatever the caption says."""
    ninth = spot.clamp(min=0) % NINTHS
    told = torch.where(boxed, ninth + NINTHS, torch.where(loose, ninth, spot))
    return torch.where(spot < 0, spot, told)


def ninths(height: int, width: int) -> Tensor:
    """Which cells of a grid belong to each ninth, 0 or 1, float32 [9,H,W]."""
    rows, columns = (
        torch.bucketize((torch.arange(n) + 0.5) / n, torch.tensor(EDGES)) for n in (height, width)
    )
    return (3 * rows[:, None] + columns == torch.arange(NINTHS)[:, None, None]).float()


def brightness(noise: Tensor) -> Tensor:
    """Of every ninth the sum of the noise in it, scaled to a variance of one: [B,Cz,F,H,W] -> [B,9]."""
    return torch.einsum("bcfhw,nhw->bn", noise[:, :CHANNELS], _directions(noise))


def _directions(noise: Tensor) -> Tensor:
    """[9,H,W], of which each, in all frames of the channels together, has a length of one."""
    height, width = noise.shape[3:]
    cells = ninths(height, width).to(noise.device)
    return cells / (CHANNELS * noise.shape[2] * cells.sum((1, 2))).sqrt()[:, None, None]


def placing_noise(noise: Tensor, spot: Tensor) -> Tensor:
    """Noise [B,Cz,F,H,W] with the brightnesses of its ninths exchanged, so that the brightest of those where
    no concept is told to be is that of the first concept without a told place, the next that of the second,
    and so on; spot int64 [B,N], in the order of the caption. A concept in the ninth of another stays as it
    is."""
    bright = brightness(noise)  # [B,9]
    numbers = torch.arange(NINTHS, device=noise.device)
    told = (spot[:, :, None] - NINTHS == numbers).any(1)  # [B,9]
    wanted, free = bright.clone(), ~told
    for k in range(spot.shape[1]):
        own = spot[:, k].clamp(min=0, max=NINTHS - 1)[:, None]  # [B,1]
        apart = (spot[:, k] >= 0) & (spot[:, k] < NINTHS) & free.gather(1, own)[:, 0]
        most = wanted.masked_fill(~free, -torch.inf).argmax(1, keepdim=True)  # [B,1]
        top, mine = wanted.gather(1, most), wanted.gather(1, own)
        swapped = wanted.scatter(1, most, mine).scatter(1, own, top)
        wanted = torch.where(apart[:, None], swapped, wanted)
        free = free & ~(apart[:, None] & (numbers == own))
    added = torch.einsum("bn,nhw->bhw", wanted - bright, _directions(noise))[:, None, None]
    return torch.cat([noise[:, :CHANNELS] + added, noise[:, CHANNELS:]], 1)
