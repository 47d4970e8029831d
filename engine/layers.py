"""Layers that both the transformer's blocks and its embedders are made of, under diffusers' names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import served, wide


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 at least and left in that dtype; [..., D] -> [..., D]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis of x, any floating dtype."""
        weight = None if self.weight is None else wide(self.weight)
        bias = None if self.bias is None else wide(self.bias)
        return F.layer_norm(wide(x), self.normalized_shape, weight, bias, self.eps)


class GeluProjection(nn.Module):
    """Linear, then GELU: `approximate` is "tanh", as in the blocks, or "none"."""

    def __init__(self, width: int, hidden: int, approximate: str) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., hidden]."""
        proj = self.proj
        if self.approximate == "tanh" and isinstance(proj, nn.Linear) and served(x, proj.weight, proj.bias):
            # GELU where the product ends; it is the tanh one on CUDA, and on CUDA only
            rows = x.reshape(-1, x.shape[-1])  # [M,width]
            out = torch._addmm_activation(proj.bias, rows, proj.weight.t(), use_gelu=True)  # [M,hidden]
            return out.unflatten(0, x.shape[:-1])
        return F.gelu(proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """A two-layer network with GELU; index 1 of `net` is where diffusers keeps its dropout."""

    def __init__(self, width: int, hidden: int, width_out: int, approximate: str = "tanh") -> None:
        super().__init__()
        first = GeluProjection(width, hidden, approximate)
        self.net = nn.Sequential(first, nn.Identity(), nn.Linear(hidden, width_out))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width_out]."""
        return self.net(x)


def mean_label(label: Tensor, label_mask: Tensor) -> Tensor:
    """Mean over a label's valid tokens: [M,L,D], bool [M,L] -> [M,1,D]; zero for a label without tokens."""
    weight = label_mask[:, :, None].to(label.dtype)  # [M,L,1]
    total = torch.where(label_mask[:, :, None], label, 0.0).sum(dim=1, keepdim=True)
    return total / weight.sum(dim=1, keepdim=True).clamp(min=1.0)  # [M,1,D]
