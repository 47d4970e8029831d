"""Wan's normalisation of queries and keys, and their rotary embedding, in one pass.

Letters: B batch, S video tokens, D width, A heads, E head width.

The RMS norm runs across all heads, so a program takes a whole token: its row of queries and its row of keys
are each read once and written once, already rotated. `inverse_rms` is what is left of the norm where another
kernel applies it (see cross_attention.py): it reads once and writes one number per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import TorchOp, launch, power_of_two, require, tl, triton, wide

# Reference.


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs of neighbouring channels: x [B,S,A,E], cos and sin [S,1,E/2] -> [B,S,A,E], x's dtype."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B,S,A,E/2] each
    return (
        torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).type_as(x)
    )


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` in plain torch."""
    heads = (-1, 2 * cos.shape[-1])
    q, k = (
        F.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, heads)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return rotate(q, cos, sin), rotate(k, cos, sin)  # [B,S,A,E] each


def inverse_rms_reference(x: Tensor, eps: float) -> Tensor:
    """`inverse_rms` in plain torch."""
    return (wide(x).square().mean(dim=-1) + eps).rsqrt()  # [B,S]


# Triton.

MAX_WIDTH = 16384
"""The widest row that fits into a program's registers."""


@triton.jit
def normed_rotated(x, weight, cos, sin, D, E, eps, BLOCK: tl.constexpr):
    """One row of D channels at x, float32 [BLOCK], 0 behind D; cos and sin are this token's, of E // 2
    pairs."""
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    value = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    value *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    pairs = tl.arange(0, BLOCK // 2)
    c = tl.load(cos + pairs % (E // 2), mask=pairs < D // 2, other=0.0)
    s = tl.load(sin + pairs % (E // 2), mask=pairs < D // 2, other=0.0)
    first, second = tl.split(tl.reshape(value, (BLOCK // 2, 2)))
    return tl.reshape(tl.join(first * c - second * s, first * s + second * c), (BLOCK,))


@triton.jit
def qk_norm_rope_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out,
    S, eps, q_b, q_s, k_b, k_s,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one token, its queries (second index 0) or its keys (1). The outputs are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // S, row % S
    cos += token * (E // 2)
    sin += token * (E // 2)
    columns = tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        turned = normed_rotated(q + batch * q_b + token * q_s, q_weight, cos, sin, D, E, eps, BLOCK)
        tl.store(q_out + row * D + columns, turned.to(q_out.dtype.element_ty), mask=columns < D)
    else:
        turned = normed_rotated(k + batch * k_b + token * k_s, k_weight, cos, sin, D, E, eps, BLOCK)
        tl.store(k_out + row * D + columns, turned.to(k_out.dtype.element_ty), mask=columns < D)


@triton.jit
def inverse_rms_kernel(x, out, S, eps, x_b, x_s, D: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one token."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    place = x + row // S * x_b + row % S * x_s + columns
    value = tl.load(place, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out + row, tl.rsqrt(tl.sum(value * value, 0) / D + eps))


def qk_norm_rope_triton(
    q_out: Tensor,
    k_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel into q_out and k_out [B,S,A,E], contiguous, and returns them: two programs for each
    token."""
    batch, tokens, width = q.shape
    block = power_of_two(width, 128, MAX_WIDTH)
    launch(
        qk_norm_rope_kernel, (batch * tokens, 2),
        q, k, q_weight, k_weight, cos, sin, q_out, k_out, tokens, eps, *q.stride()[:2], *k.stride()[:2],
        D=width, E=q_out.shape[-1], BLOCK=block, num_warps=4 if block <= 2048 else 8, num_stages=1,
    )  # fmt: skip
    return q_out, k_out


def inverse_rms_triton(out: Tensor, x: Tensor, eps: float) -> Tensor:
    """Launches the kernel into `out` float32 [B,S], contiguous, and returns it."""
    batch, tokens, width = x.shape
    block = power_of_two(width, 128, MAX_WIDTH)
    launch(
        inverse_rms_kernel, (batch * tokens,), x, out, tokens, eps, *x.stride()[:2],
        D=width, BLOCK=block, num_warps=4 if block <= 2048 else 8, num_stages=1,
    )  # fmt: skip
    return out


# The torch ops.


def _check(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        require("qk_norm_rope", table.is_contiguous(), f"{name} is not contiguous: pass {name}.contiguous()")
    pairs, width = cos.shape[-1], q.shape[-1]
    message = f"cos and sin must be [S,1,E/2], E a divisor of {width}, not {list(cos.shape)}"
    require("qk_norm_rope", width % (2 * pairs) == 0, message)


def _empty(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, *_: Any) -> Any:
    shape = (*q.shape[:2], q.shape[2] // (2 * cos.shape[-1]), 2 * cos.shape[-1])
    return q.new_empty(shape), q.new_empty(shape)  # [B,S,A,E] each


def _empty_rms(x: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))  # [B,S]


_qk_norm_rope = TorchOp(
    "qk_norm_rope",
    "q BSD, k BSD, q_weight D, k_weight D, cos float32 or wide S1R, sin float32 or wide S1R",
    scalars="float eps",
    outputs=2,
    reference=qk_norm_rope_reference,
    cuda=lambda *arguments: qk_norm_rope_triton(*_empty(*arguments), *arguments),
    empty=_empty,
    limits={"D": MAX_WIDTH},
    further=_check,
)
_inverse_rms = TorchOp(
    "inverse_rms",
    "x BSD",
    scalars="float eps",
    reference=inverse_rms_reference,
    cuda=lambda x, eps: inverse_rms_triton(_empty_rms(x, eps), x, eps),
    empty=_empty_rms,
    limits={"D": MAX_WIDTH},
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, RMS-normalised across all heads and rotated in pairs of neighbouring channels.

    q and k [B,S,D], as projected; weights [D]; cos and sin float32 [S,1,E/2], which say how wide a head is.
    Returns two [B,S,A,E] in q's dtype. The kernel rounds once, at the end; the reference after the norm too,
    as the model does. Raises ValueError for other shapes, dtypes or devices.
    """
    return _qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)


def inverse_rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """1 / sqrt(mean(x²) + eps) over the last axis: x [B,S,D] -> float32 [B,S] (float64 of float64)."""
    return _inverse_rms(x, eps)
