"""Pictures as tokens of their own behind the video's: what differs from a plain transformer.

A picture's clean latents go through the video's patch embedding and have the video's time. Their tokens stand
behind the video's in every self-attention, and behind the last block they are dropped. Where they are is told
by rotary rows of their own, constants of a configuration:

* `behind`: each picture is a frame that follows the video's last one (Phantom's subject2video.py,
  SkyReels-V3's reference_to_video_pipeline.py). A branch of the guidance that does not see a picture has zero
  latents in its place, and so has a place without one.

Letters: K guidance branches, N pictures, F H W latent frames (f h w in patches), S video tokens, R pictures'
tokens, D width, E head width, Cz latent channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .config import ModelConfig

AS_TOKENS = ("behind",)
"""What `ConceptConfig.given` is where pictures are tokens of their own."""


def placed(config: ModelConfig, grid: tuple[int, int, int]) -> np.ndarray:
    """Where every patch is, of a video of so many patches (frames, rows, columns), then of the pictures:
    whole numbers [S+R,3] on the same axes."""
    frames, rows, columns = grid
    if config.concept.given == "behind":
        frames += config.concept.max_concepts
    return np.indices((frames, rows, columns)).reshape(3, -1).T


def with_pictures(x: Tensor, embedding: nn.Conv3d, pictures: Tensor, concept_mask: Tensor | None) -> Tensor:
    """The video's tokens [K or 1,S,D], then the pictures' in each branch, [K or 1,S+R,D].

    embedding: of patches; pictures: clean latents [1 or K,Cz,N,H,W]; concept_mask: which branch sees which,
    bool [K,N], None where all see all.
    """
    if concept_mask is not None:
        pictures = torch.where(concept_mask[:, None, :, None, None], pictures, 0.0)  # [K,Cz,N,H,W]
    tokens = embedding(pictures).flatten(2).transpose(1, 2)  # [K or 1,R,D]
    branches = max(len(x), len(tokens))
    return torch.cat([part.expand(branches, -1, -1) for part in (x, tokens)], dim=1)  # [K or 1,S+R,D]
