"""Several pictures on one, as the runtime puts a request's together for a model that takes one picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptmaster.engine.encoders import CLIP_MEAN, CLIP_STD
from conceptmaster.runtime.canvas import SQUARE, cells


def tiled(pixels: Tensor, filled: Tensor) -> Tensor:
    """pixels [B,N,3,px,px] (CLIP-normalised), filled bool [B,N] -> [B,3,px,px]: on white, the filled ones in
    the order of their slots; all white where none is."""
    side = pixels.shape[-1]
    mean, std = (torch.tensor(values, device=pixels.device) for values in (CLIP_MEAN, CLIP_STD))
    whole = ((1 - mean) / std)[:, None, None].repeat(len(pixels), 1, 1, 1)  # [B,3,1,1]
    whole = whole.expand(-1, -1, side, side).type_as(pixels).clone()
    order = (~filled).int().argsort(dim=1, stable=True)  # the filled slots first
    for count in range(1, filled.shape[1] + 1):
        rows = torch.nonzero(filled.sum(1) == count)[:, 0]
        for place, (left, top, right, bottom) in enumerate(cells(count, (side, side), SQUARE)[:count]):
            own = pixels[rows, order[rows, place]]  # [b,3,px,px]
            width, height = right - left, bottom - top
            size = min(width, height)
            if size < side:
                own = F.interpolate(own, size=(size, size), mode="bicubic", antialias=True)
            x, y = left + (width - size) // 2, top + (height - size) // 2
            whole[rows, :, y : y + size, x : x + size] = own
    return whole
