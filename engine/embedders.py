"""What the transformer is told besides the latents, brought to its width: time, text, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import FeedForward, WideLayerNorm
from .positions import Constants
from .transformer_config import TransformerConfig


class TwoLayers(nn.Module):
    """Linear, activation, Linear, under the names linear_1 and linear_2."""

    def __init__(self, width_in: int, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., width_in] -> [..., width]."""
        return self.linear_2(self.activation(self.linear_1(x)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class TimeWaves(Constants):
    """Cosines, then sines, of a time at `width`/2 frequencies from 1 down to nearly 1/10000."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        # In float32 on purpose: the exact values that Wan's weights were trained with.
        steps = torch.arange(width // 2, dtype=torch.float32, device="cpu")
        super().__init__(frequencies=torch.exp(-math.log(10000.0) * steps / (width // 2)))

    def forward(self, time: Tensor) -> Tensor:
        """time [B] -> float32 [B,width], or of any shape."""
        angle = time.unsqueeze(-1).float() * self.frequencies  # [B,width/2]
        return torch.cat((angle.cos(), angle.sin()), dim=-1)  # [B,width]


class PictureEmbedder(nn.Module):
    """An image-to-video model's: picture tokens to the transformer's width.

    `positions`: how many tokens have an embedding of their place added, None for none.
    """

    def __init__(self, picture_width: int, width: int, positions: int | None) -> None:
        super().__init__()
        eps = 1e-5  # diffusers' default, not the transformer's
        self.norm1 = WideLayerNorm(picture_width, eps)
        self.ff = FeedForward(picture_width, picture_width, width, approximate="none")
        self.norm2 = WideLayerNorm(width, eps)
        self.pos_embed: nn.Parameter | None = None
        if positions is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, positions, picture_width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of all pictures, one after the other, [K,C,Dp] -> [K,C,D]."""
        x = tokens if self.pos_embed is None else tokens + self.pos_embed
        x = self.ff(self.norm1(x).type_as(tokens))  # [K,C,D]
        return self.norm2(x).type_as(tokens)


class ConditionEmbedder(nn.Module):
    """Time to modulation; text, and in image-to-video models pictures, to the transformer's width."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.time_waves = TimeWaves(config.freq_dim)
        self.time_embedder = TwoLayers(config.freq_dim, config.width, F.silu)
        self.time_proj = nn.Linear(config.width, 6 * config.width)
        self.text_embedder = TwoLayers(config.text_dim, config.width, _gelu_tanh)
        self.image_embedder: PictureEmbedder | None = None
        if config.image_dim is not None:
            self.image_embedder = PictureEmbedder(config.image_dim, config.width, config.pos_embed_seq_len)

    def time(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """time [B] in 0..1000 -> embedding [B,D], and the blocks' modulation [B,6,D]; of [B,F] times, one for
        each latent frame, [B,F,D] and [B,F,6,D]."""
        waves = self.time_waves(time).to(self.time_embedder.linear_1.weight.dtype)  # [B,freq_dim]
        embedding = self.time_embedder(waves)  # [B,D]
        hidden = F.silu(embedding).to(self.time_proj.weight.dtype)
        return embedding, self.time_proj(hidden).unflatten(-1, (6, -1))  # [B,D], [B,6,D]
