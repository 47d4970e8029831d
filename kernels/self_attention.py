"""Self-attention over video tokens: the best that is there.

Letters: B batch, S video tokens, A heads, E head width.

On CUDA it is FlashAttention-3 where that is importable and the GPU is a Hopper, else PyTorch's own in the
order cuDNN, flash, memory-efficient, plain. Elsewhere, and where a gradient is wanted, plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .common import check_operands, operands, served
from .cross_attention import attention

FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""PyTorch's own in the order in which they are tried."""

OPERANDS = operands("q BSAE, k BSAE, v BSAE")


@functools.cache
def flash_attention_3() -> Callable[..., object] | None:
    """FlashAttention-3's function where its package can be imported, else None; looked for once."""
    try:
        return importlib.import_module("flash_attn_interface").flash_attn_func
    except ImportError:
        return None


@torch.compiler.assume_constant_result
def _with_flash_attention_3(index: int) -> bool:
    """Whether there is one for the GPU of this number. A constant to torch.compile, which cannot import."""
    return torch.cuda.get_device_capability(index)[0] == 9 and flash_attention_3() is not None


def _on_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.dtype in (torch.float16, torch.bfloat16) and _with_flash_attention_3(q.device.index):
        out = flash_attention_3()(q, k, v)  # type: ignore[misc]  # it is there
        return out[0] if isinstance(out, tuple) else out  # type: ignore[return-value]  # some also give the sums
    with sdpa_kernel(FASTEST, set_priority=True):
        return attention(q, k, v)


def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention among video tokens, scaled by 1/sqrt(E): q, k, v [B,S,A,E] -> [B,S,A,E] in q's dtype.

    Raises ValueError for other shapes, mixed dtypes or devices.
    """
    check_operands("self_attention", OPERANDS, (q, k, v))
    return _on_cuda(q, k, v) if served(q, k, v) else attention(q, k, v)
