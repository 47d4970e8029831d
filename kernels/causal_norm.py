"""What stands before a convolution that is causal in time, in one pass: bias, residual, RMSNorm, SiLU, and
the frames before.

Letters: F frames, G frames before them that the convolution sees, S positions of a frame, C channels.

Channels lie last. The convolution's padding in time is not made by copying: what is normed is written behind
the frames that were kept, where the convolution reads both. Its padding in space is the convolution's own.
The sum of bias and residual is rounded to x's dtype before the norm, as if the steps were separate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import TorchOp, launch, power_of_two, require, tl, triton, wide

Found = tuple[Tensor, Tensor, Tensor]

# Reference.


def causal_norm_reference(
    x: Tensor, before: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, keep: bool
) -> Found:
    """`causal_norm` in plain torch."""
    summed = wide(x)
    for added in (bias, residual):
        summed = summed if added is None else summed + wide(added)  # [F,S,C]
    summed = summed.type_as(x)
    normed = summed
    if weight is not None:
        normed = F.normalize(wide(summed), dim=-1) * x.shape[-1] ** 0.5 * wide(weight)
        normed = F.silu(normed).type_as(x)
    ahead = torch.cat((before, normed))  # [G+F,S,C]
    return (summed if keep else x.new_empty(0)), ahead, ahead[len(x) :].clone()


# Triton.

MAX_CHANNELS = 2048
"""The most channels that fit into a program's registers."""
ELEMENTS = 4096
"""Of one program: 32 values a thread in 4 warps."""


@triton.jit
def causal_norm_kernel(
    x, before, weight, bias, residual, summed, ahead, following,
    F, G, S,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One program: ROWS positions of one of the G + F frames. All tensors are contiguous."""
    frame = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < S)[:, None] & (columns < C)[None, :]
    within = rows[:, None] * C + columns[None, :]  # in one frame
    size = S.to(tl.int64) * C
    if frame < G:
        value = tl.load(before + frame * size + within, mask=inside, other=0.0)
    else:
        place = (frame - G) * size + within
        value = tl.load(x + place, mask=inside, other=0.0)
        if HAS_BIAS or HAS_RESIDUAL:
            total = value.to(tl.float32)
            if HAS_BIAS:
                total += tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
            if HAS_RESIDUAL:
                total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
            value = total.to(ahead.dtype.element_ty)
        if KEEP:
            tl.store(summed + place, value, mask=inside)
        if NORM:
            wide = tl.where(inside, value.to(tl.float32), 0.0)
            length = tl.sqrt(tl.sum(wide * wide, 1))[:, None]
            factor = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
            wide = wide / tl.maximum(length, 1e-12) * tl.sqrt(C * 1.0) * factor
            value = (wide / (1.0 + tl.exp(-wide))).to(ahead.dtype.element_ty)
    tl.store(ahead + frame * size + within, value, mask=inside)
    if frame >= F:
        tl.store(following + (frame - F) * size + within, value, mask=inside)


def causal_norm_triton(
    summed: Tensor | None,
    ahead: Tensor,
    following: Tensor,
    x: Tensor,
    before: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Launches the kernel into `summed` (None: not kept) [F,S,C], `ahead` [G+F,S,C], `following` [G,S,C]."""
    frames, positions, channels = x.shape
    block = power_of_two(channels, 16, MAX_CHANNELS)
    rows = max(1, ELEMENTS // block)
    others = [x if tensor is None else tensor for tensor in (weight, bias, residual, summed)]  # not looked at
    launch(
        causal_norm_kernel, (-(-positions // rows), len(ahead)),
        x, before, *others, ahead, following, frames, len(before), positions,
        C=channels, BLOCK=block, ROWS=rows, NORM=weight is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, KEEP=summed is not None, num_warps=4, num_stages=1,
    )  # fmt: skip


# The torch op.


def _empty(x: Tensor, before: Tensor, weight: object, bias: object, residual: object, keep: bool) -> Found:
    ahead = x.new_empty((len(before) + len(x), *x.shape[1:]))
    return x.new_empty(x.shape if keep else 0), ahead, torch.empty_like(before)


def _cuda(
    x: Tensor, before: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, keep: bool
) -> Found:
    summed, ahead, following = _empty(x, before, weight, bias, residual, keep)
    causal_norm_triton(summed if keep else None, ahead, following, x, before, weight, bias, residual)
    return summed, ahead, following


def _contiguous(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        whole = not isinstance(tensor, Tensor) or tensor.is_contiguous()
        require("causal_norm", whole, "all tensors must be contiguous")


_causal_norm = TorchOp(
    "causal_norm",
    "x FSC, before GSC, weight? C, bias? C, residual? FSC",
    scalars="bool keep",
    outputs=3,
    reference=causal_norm_reference,
    cuda=_cuda,
    empty=_empty,
    limits={"C": MAX_CHANNELS},
    further=lambda *arguments: _contiguous(*arguments[:5]),
)


def causal_norm(
    x: Tensor,
    before: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    keep: bool = False,
) -> Found:
    """What a causal convolution reads, and what it will read before the next frames.

    summed = x + bias + residual; normed = SiLU(summed / |summed| * sqrt(C) * weight), as in Wan's VAE, or
    summed itself without weight; ahead = before and then normed.

    x and residual [F,S,C], before [G,S,C], weight and bias [C], one dtype, contiguous.
    Returns summed [F,S,C] (empty unless `keep`), ahead [G+F,S,C], and its last G frames, a tensor of its own.
    Raises ValueError for other shapes, dtypes, strides or devices.
    """
    return _causal_norm(x, before, weight, bias, residual, keep)
