"""Pictures as tokens of their own behind the video's: what differs from a plain transformer.

A picture's clean latents go through the video's patch embedding and have the video's time. Their tokens stand
behind the video's in every self-attention, and behind the last block they are dropped. Where they are is told
by rotary rows of their own, constants of a configuration:

* `behind`: each picture is a frame that follows the video's last one (Phantom's subject2video.py,
  SkyReels-V3's reference_to_video_pipeline.py). A branch of the guidance that does not see a picture has zero
  latents in its place, and so has a place without one.

* `grids`: each picture has a size of its own, up to a square of `ConceptConfig.side`, and a grid that begins
  at (0, 0, 0), as the video's does. What tells them apart is a phase on top, source * 10000^(-2k/E) on the
  k-th pair of a head: the video is source 0, the pictures are 1, 2, … (Bernini's WanRotaryPosEmbed). With
  fixed shapes a picture lies in the upper left corner of the square; what is outside of it is no key of any
  self-attention, nor is any of a branch that does not see it. In front of the latents is a channel that tells
  of each place its picture's source, 0 outside.

Letters: K guidance branches, of which R see pictures, N pictures, F H W latent frames (f h w in patches), S
video tokens, P pictures' tokens, D width, E head width, Cz latent channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .blocks import Among
from .config import ModelConfig

AS_TOKENS = ("behind", "grids")
"""What `ConceptConfig.given` is where pictures are tokens of their own."""

Rotary = tuple[Tensor, Tensor]


def placed(config: ModelConfig, grid: tuple[int, int, int], square: int) -> np.ndarray:
    """Where every patch is, of a video of so many patches (frames, rows, columns), then of the pictures, on
    grids of their own in squares of `square` patches a side: whole numbers [S+P,3] on the same axes."""
    frames, rows, columns = grid
    if config.concept.given == "behind":
        frames += config.concept.max_concepts
    places = np.indices((frames, rows, columns)).reshape(3, -1).T
    if config.concept.side is not None:
        own = np.indices((1, square, square)).reshape(3, -1).T
        places = np.concatenate((places, *[own] * config.concept.max_concepts))
    return places


def with_pictures(x: Tensor, embedding: nn.Conv3d, pictures: Tensor, concept_mask: Tensor | None) -> Tensor:
    """The video's tokens [K or 1,S,D], then the pictures' in each branch, [K or 1,S+P,D].

    embedding: of patches; pictures: clean latents [1 or K,Cz,N,H,W]; concept_mask: which branch sees which,
    bool [K,N], None where all see all.
    """
    if concept_mask is not None:
        pictures = torch.where(concept_mask[:, None, :, None, None], pictures, 0.0)  # [K,Cz,N,H,W]
    tokens = embedding(pictures).flatten(2).transpose(1, 2)  # [K or 1,P,D]
    branches = max(len(x), len(tokens))
    return torch.cat([part.expand(branches, -1, -1) for part in (x, tokens)], dim=1)  # [K or 1,S+P,D]


def with_grids(
    x: Tensor,
    rotary: Rotary,
    embedding: nn.Conv3d,
    given: Tensor,
    concept_mask: Tensor | None,
    branches: int,
    kept: Tensor | None = None,
) -> tuple[Tensor, Rotary, Among]:
    """The tokens [K,S+P,D] of video and pictures, the video's first; their rotary tables; and who sees whom.

    x: the video's [K or 1,S,D]; rotary: cosines and sines of grids alone, [S+P,1,E/2]; embedding: of patches;
    given: float32 [1,1+Cz,N,side,side]; concept_mask: bool [K or R,N] which branch sees which, None where all
    see all; the first K-R see none. kept: int64 [P'], of all places those that are a picture's, where the
    host knows them: then there are no others, and every one of the R sees them all.
    """
    video, (_, down, across) = x.shape[1], embedding.stride
    source = given[0, 0, :, ::down, ::across].flatten(1)  # [N,P/N]
    latents = given[:, 1:].to(embedding.weight.dtype)
    tokens = embedding(latents).flatten(2).transpose(1, 2)  # [1,P,D]
    cos, sin = (table[video:] for table in rotary)  # [P,1,E/2]
    seeing = branches if concept_mask is None else len(concept_mask)
    if kept is not None:
        places, mask = source.flatten()[kept], None
        tokens, cos, sin = tokens[:, kept], cos[kept], sin[kept]
    else:
        places, seen = source.flatten(), (source > 0)[None]  # [P], [1,N,P/N]
        if concept_mask is not None:
            seen = seen & concept_mask[:, :, None]  # [R,N,P/N]
        seen = seen.flatten(1)
        mask = torch.cat((seen.new_ones(len(seen), video), seen), dim=1)  # [R or 1,S+P]
        mask = mask.expand(seeing, -1)
    cos, sin = _turned(cos, sin, places)
    rotary = torch.cat((rotary[0][:video], cos)), torch.cat((rotary[1][:video], sin))
    x = torch.cat([part.expand(branches, -1, -1) for part in (x, tokens)], dim=1)  # [K,S+P,D]
    return x, rotary, Among(video, branches - seeing, mask)


def _turned(cos: Tensor, sin: Tensor, source: Tensor) -> Rotary:
    """The tables [P,1,E/2] with the phase of each place's source [P] added."""
    pairs = cos.shape[-1]
    place = torch.arange(pairs, device=cos.device, dtype=cos.dtype)
    phase = source.type_as(cos)[:, None, None] * 10000.0 ** (-place / pairs)  # [P,1,E/2]
    c, s = phase.cos(), phase.sin()
    return cos * c - sin * s, sin * c + cos * s
