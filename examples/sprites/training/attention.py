"""Attention as it trains fastest on CPUs at this size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from conceptmaster.kernels.common import in_plain_torch


class PlainAttention(TorchFunctionMode):
    """Softmax attention in three operations, in the dtype of its inputs but for the softmax: on CPUs a third
    to a half of the time of torch's own with its gradient, at this size."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Takes the place of ``scaled_dot_product_attention``; all else runs as it is."""
        kwargs = kwargs or {}
        plain = not any(kwargs.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
        if func is not F.scaled_dot_product_attention or not plain:
            return func(*args, **kwargs)
        q, k, v = args
        return _plain_attention(q, k, v, kwargs.get("attn_mask"), kwargs.get("scale"))


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """[B,A,S,E], [B,A,T,E] twice -> [B,A,S,E]; ``mask`` bool (True: attend) or what to add to the scores."""
    scores = ((q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)).float()  # [B,A,S,T]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


def cheapest_attention(device: str) -> AbstractContextManager[Any]:
    """On CPUs ``PlainAttention``: there torch's fused one takes half of a step for its gradient alone.

    Elsewhere torch's own, also where no gradient is wanted: the kernels that serve take one dtype, and
    autocast may leave queries wider than values.
    """
    return PlainAttention() if torch.device(device).type == "cpu" else in_plain_torch()
