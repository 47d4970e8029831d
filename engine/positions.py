"""Where a video token is: rotary tables, position channels, and constants that keep their precision.

Letters: B batch, F H W latent frames, height, width, S video tokens, R tokens of pictures behind them
(references.py), E head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .concept_config import PATCH
from .config import ModelConfig
from .references import placed
from .transformer_config import TransformerConfig


def rotary_tables(config: TransformerConfig, places: np.ndarray) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the 3-D rotary embedding, of patches at these places [S,3] (frame, row, column).

    Two float32 tensors [S,1,E/2], computed in float64: the pairs of a head are shared out over the three axes
    as in Wan2.1 (rows and columns get E//6 pairs each, frames the rest), with base 10000 on each axis.
    """
    pairs = config.attention_head_dim // 2
    side = config.attention_head_dim // 6
    angles = []
    for axis, count in zip(places.T, (pairs - 2 * side, side, side), strict=True):
        inverse = 10000.0 ** (-np.arange(count, dtype=np.float64) / count)
        angles.append(np.outer(axis.astype(np.float64), inverse))  # [S,count]
    table = np.concatenate(angles, axis=1)[:, None]  # [S,1,E/2]
    return torch.from_numpy(np.cos(table).astype(np.float32)), torch.from_numpy(
        np.sin(table).astype(np.float32)
    )


def position_table(channels: int, grid: tuple[int, int, int]) -> Tensor:
    """Constant channels that tell each latent position where it is: float32 [1,channels,F,H,W].

    For each axis, with u the centre of its cell in 0..1: sines, then cosines, of pi*u, 2*pi*u, 4*pi*u, …
    """
    count = channels // 6
    planes = []
    for axis, length in enumerate(grid):
        u = (np.arange(length, dtype=np.float64) + 0.5) / length
        angle = np.outer(math.pi * 2.0 ** np.arange(count), u)  # [channels/6,length]
        shape = [2 * count, 1, 1, 1]
        shape[1 + axis] = length
        plane = np.concatenate([np.sin(angle), np.cos(angle)]).reshape(shape)
        planes.append(np.broadcast_to(plane, (2 * count, *grid)))
    return torch.from_numpy(np.concatenate(planes).astype(np.float32))[None]  # [1,channels,F,H,W]


class Constants(nn.Module):
    """Named constant tensors: they follow a module to its device but keep their dtype, and are not saved."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        kept = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = tensor.to(moved.device)
        return self


class Positions(Constants):
    """Tables for the configuration's own latent shape, as constants, and for any other shape on the fly."""

    cos: Tensor
    sin: Tensor
    planes: Tensor

    def __init__(self, config: ModelConfig) -> None:
        square = (config.concept.side or 0) // PATCH
        cos, sin, planes = self._tables(config, config.denoised_shape[1:], square)
        super().__init__(cos=cos, sin=sin, planes=planes)
        self.config, self.square = config, square

    @staticmethod
    def _tables(config: ModelConfig, latents: tuple[int, ...], square: int) -> tuple[Tensor, Tensor, Tensor]:
        f, h, w = latents
        pf, ph, pw = config.transformer.patch_size
        places = placed(config, (f // pf, h // ph, w // pw), square)  # [S+R,3]
        most, grid = config.transformer.rope_max_seq_len, tuple(int(n) + 1 for n in places.max(axis=0))
        if max(grid) > most:
            raise ValueError(f"{grid} patches: a side exceeds rope_max_seq_len ({most})")
        planes = position_table(config.transformer.position_channels, (f, h, w))
        return *rotary_tables(config.transformer, places), planes

    def forward(self, latents: Tensor, square: int | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """latents [B,Cz,F,H,W] -> (latents [B,Cz+p,F,H,W] with position channels behind, rotary (cos, sin)).

        square: of pictures on grids of their own, the patches of a side of what each is in; None for the
        configuration's. cos and sin are float32 [S+R,1,E/2]. Raises ValueError for a side, pictures and all,
        that is longer than rope_max_seq_len patches.
        """
        shape = tuple(latents.shape[2:])
        square = self.square if square is None else square
        if shape == self.config.denoised_shape[1:] and square == self.square:
            cos, sin, planes = self.cos, self.sin, self.planes
        else:
            cos, sin, planes = (t.to(latents.device) for t in self._tables(self.config, shape, square))
        if self.config.transformer.position_channels:
            planes = planes.to(latents.dtype).expand(latents.shape[0], -1, -1, -1, -1)
            latents = torch.cat((latents, planes), dim=1)  # [B,Cz+p,F,H,W]
        return latents, (cos, sin)
