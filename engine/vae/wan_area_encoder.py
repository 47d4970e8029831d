"""Wan2.1's VAE encoder for a picture of any size, in one graph: a canvas of fixed size, and how much of it is
picture.

What a convolution sees beyond a picture's edge is zero. So the canvas is set to zero outside of the picture
before each of them, and the one attention has no keys there: then the picture's latents are those of the
picture alone. Sides are whole latents, which every layer on the way down divides.

Letters: Cz latent channels, H W latent height, width of the canvas.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.cross_attention import attention
from .wan_encoder import _Encode, _patched


class EncodeArea(_Encode):
    """(frames [1,height,width,3] in -1..1, area [1,1,1,H,W], one where the picture is) -> latents
    [1,Cz,1,H,W], normalised, zero where it is not.

    The picture is in the upper left corner and there is one; what is outside of it is not read, not even
    where it is not a number.
    """

    def forward(self, frames: Tensor, area: Tensor) -> tuple[Tensor]:
        """A tuple of the latents, as where states follow."""
        coder, inside = self.encoder, area[:, :, 0] > 0  # [1,1,H,W]
        x = _patched(frames.permute(3, 0, 1, 2)[None], self.patch)[:, :, 0]  # [1,3*patch*patch,h,w]
        scale = x.shape[2] // inside.shape[2]
        there = inside.repeat_interleave(scale, 2).repeat_interleave(scale, 3)  # [1,1,h,w]
        x = _convolved(coder.conv_in, x, there)
        for layer in coder.down_blocks:
            x, there = _layer(layer, x, there)
        middle = coder.mid_block
        x = _residual(middle.resnets[0], x, there)
        for block, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            x = _residual(resnet, _attended(block, x, there), there)
        x = _convolved(coder.conv_out, F.silu(_normed(coder.norm_out, x)), there)
        x = self.quant_conv(x[:, :, None]).chunk(2, dim=1)[0]  # [1,Cz,1,H,W]
        return (torch.where(there[:, :, None], (x - self.mean) / self.std, 0.0),)


def _layer(layer: Any, x: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """One on the way down, and where the picture is behind it."""
    if hasattr(layer, "conv1"):
        return _residual(layer, x, there), there
    return layer.resample(torch.where(there, x, 0.0)), there[:, :, ::2, ::2]  # a first frame stays one


def _residual(block: Any, x: Tensor, there: Tensor) -> Tensor:
    h = _convolved(block.conv1, F.silu(_normed(block.norm1, x)), there)
    h = _convolved(block.conv2, F.silu(_normed(block.norm2, h)), there)
    shortcut = block.conv_shortcut
    return h + (x if isinstance(shortcut, nn.Identity) else shortcut(x[:, :, None])[:, :, 0])


def _convolved(layer: Any, x: Tensor, there: Tensor) -> Tensor:
    """A causal convolution of a single frame: [1,C,h,w] -> [1,C',h,w]."""
    return layer(torch.where(there, x, 0.0)[:, :, None])[:, :, 0]


def _normed(norm: Any, x: Tensor) -> Tensor:
    return norm(x[:, :, None])[:, :, 0]


def _attended(block: Any, x: Tensor, there: Tensor) -> Tensor:
    """Among the picture's own places, with one head."""
    q, k, v = block.to_qkv(block.norm(x)).flatten(2).transpose(1, 2)[:, :, None].chunk(3, dim=-1)
    found = attention(q, k, v, there.flatten(1))  # [1,hw,1,C]
    return x + block.proj(found[:, :, 0].transpose(1, 2).unflatten(2, x.shape[2:]))
