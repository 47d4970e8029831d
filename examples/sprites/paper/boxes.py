"""The boxes of concepts, from what the caption tells alone: place and motion. They add nothing to it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from conceptmaster.engine.config import ModelConfig
from conceptmaster.runtime.boxes import tokens

from ..world.scenes import CELL, SIZE

HALF = 13.0
"""Half a box's side in pixels: what most sprites reach, wherever in its cell one starts."""


def told_boxes(path: Tensor) -> Tensor:
    """Paths [B,N,F,2] in pixels -> boxes x0, y0, x1, y1 in fractions of the picture, [B,N,F,4]: around the
    same path from the middle of the cell that it starts in."""
    start = path[:, :, :1]
    middle = ((start - SIZE / 2) / CELL).round() * CELL + SIZE / 2
    told = path - start + middle  # [B,N,F,2]
    return (torch.cat((told - HALF, told + HALF), -1) / SIZE).clamp(0, 1)


def seen_tokens(boxes: Tensor, config: ModelConfig) -> Tensor:
    """Which video tokens a box touches: boxes [B,N,F,4] -> bool [B,S,N], as a request's are drawn."""
    parts = zip(config.latent_shape[1:], config.transformer.patch_size, strict=True)
    frames, height, width = (size // patch for size, patch in parts)
    each = int(config.vae["scale_factor_temporal"])
    starts = [max(0, 1 + (first - 1) * each) for first in range(frames)]
    drawn = tokens(boxes.numpy(), (frames, height, width), starts)  # [B,N,f,h,w]
    moved = np.moveaxis(drawn, 1, -1).reshape(len(boxes), -1, boxes.shape[1])  # [B,S,N]
    return torch.from_numpy(np.ascontiguousarray(moved))
