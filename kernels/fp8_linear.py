"""A linear layer in fp8: weights quantised once, activations on the way in, the product on 8-bit tensor
cores.

Letters: M tokens (any leading axes, flattened), I input width, O output width.

Both sides are float8_e4m3fn with float32 scales, one for each token and one for each output channel, so that
one large value spoils its own row only. The product is PyTorch's (`torch._scaled_mm`, cuBLAS); what is this
project's own is the kernel that finds a token's scale and quantises it while it is in registers, with the
GELU before a feed-forward's second layer where that is wanted. Part of the opt-in tier `high`: its error is
`RELATIVE_L2["linear8"]` in tolerances.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import INTERPRETED, TorchOp, launch, power_of_two, require, tl, to_fp8, triton

FP8_MAX = 448.0
"""The largest value of float8_e4m3fn."""
MAX_WIDTH = 16384
"""The widest row that fits into a program's registers."""


class Quantised(NamedTuple):
    """values float8_e4m3fn [...,I] times scale float32, [...,1] or [1]."""

    values: Tensor
    scale: Tensor


# Reference.


def to_float8(x: Tensor) -> Tensor:
    """x in float8_e4m3fn: to the nearest, what is too large to the largest."""
    return x.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantise_rows(x: Tensor, gelu: bool = False) -> Quantised:
    """[..., I], or its GELU (the tanh one) in float32, as values [..., I] and scales [..., 1]."""
    x = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8) / FP8_MAX  # [...,1]
    return Quantised(to_float8(x / scale), scale)


def fp8_linear_reference(
    x: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor | None, gelu: bool, fast: bool
) -> Tensor:
    """`fp8_linear` in plain torch, in float32."""
    return fp8_product(quantise_rows(x, gelu), weight8, weight_scale, bias, fast, x.dtype)


# Triton.


@triton.jit
def quantise_rows_kernel(
    x, out, scale, x_m, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, ROUND: tl.constexpr
):
    """One program: one token."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_m + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if GELU:  # x (1 + tanh(z)) / 2 is x sigmoid(2 z)
        value *= tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    step = tl.maximum(tl.max(tl.abs(value), 0), 1e-8) / 448.0
    tl.store(out + row * WIDTH + columns, to_fp8(value / step, ROUND), mask=columns < WIDTH)
    tl.store(scale + row, step)


def quantise_rows_triton(out: Tensor, scale: Tensor, x: Tensor, gelu: bool = False) -> Quantised:
    """Launches the kernel into `out` float8_e4m3fn [M,I], `scale` float32 [M,1], contiguous; returns both."""
    rows, width = x.shape
    block = power_of_two(width, 128, MAX_WIDTH)
    launch(
        quantise_rows_kernel, (rows,), x, out, scale, x.stride(0), WIDTH=width, BLOCK=block, GELU=gelu,
        ROUND=INTERPRETED, num_warps=4 if block <= 2048 else 8, num_stages=1,
    )  # fmt: skip
    return Quantised(out, scale)


# The torch op.


def fp8_product(
    x: Quantised, weight8: Tensor, weight_scale: Tensor, bias: Tensor | None, fast: bool, dtype: torch.dtype
) -> Tensor:
    """x times the transposed weight, plus bias, [...,O] in `dtype`; on CUDA bfloat16. The rest as
    `fp8_linear`."""
    values, scale = x
    if not values.is_cuda:
        out = F.linear(values.float() * scale, weight8.float() * weight_scale)  # [...,O]
        return (out if bias is None else out + bias.float()).to(dtype)
    rows = values.reshape(-1, values.shape[-1])  # [M,I]
    out = torch._scaled_mm(
        rows, weight8.t(), scale_a=scale.reshape(-1, 1).expand(len(rows), 1).contiguous(),
        scale_b=weight_scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=fast,
    )  # [M,O]  # fmt: skip
    return out.reshape(*values.shape[:-1], -1)  # [...,O]


def why_no_fp8(device: torch.device) -> str | None:
    """Why this GPU cannot multiply in fp8; None where it can, and of the CPU, where the reference runs."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 9):
        return None
    return f"fp8 needs compute capability 8.9 or newer, this GPU has {major}.{minor}"


def _check(
    x: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor | None, gelu: bool, fast: bool
) -> None:
    op, shape = "fp8_linear", list(weight8.shape)
    require(op, x.dtype != torch.float64, "float64 is not for 8 bits")
    require(op, weight8.is_contiguous(), "weight8 is not contiguous: pass weight8.contiguous()")
    if x.is_cuda:
        reason = why_no_fp8(x.device)
        require(op, reason is None, f"{reason}: keep nn.Linear")
        require(op, x.dtype == torch.bfloat16, f"on CUDA x must be bfloat16, not {x.dtype}")
        sixteen = shape[0] % 16 == 0 and shape[1] % 16 == 0
        require(op, sixteen, f"on CUDA both widths must divide by 16, not {shape}: keep nn.Linear")


def _cuda(
    x: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor | None, gelu: bool, fast: bool
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])  # [M,I]
    x8 = rows.new_empty(rows.shape, dtype=torch.float8_e4m3fn)
    scale = rows.new_empty((len(rows), 1), dtype=torch.float32)
    quantised = quantise_rows_triton(x8, scale, rows, gelu)
    out = fp8_product(quantised, weight8, weight_scale, bias, fast, x.dtype)  # [M,O]
    return out.reshape(*x.shape[:-1], -1)  # [...,O]


_fp8_linear = TorchOp(
    "fp8_linear",
    "x *I, weight8 fp8 OI, weight_scale float32 O1, bias? O",
    scalars="bool gelu, bool fast",
    reference=fp8_linear_reference,
    cuda=_cuda,
    empty=lambda x, weight8, *_: x.new_empty((*x.shape[:-1], weight8.shape[0])),
    limits={"I": MAX_WIDTH},
    further=_check,
)


def fp8_linear(
    x: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    fast: bool = False,
) -> Tensor:
    """x, or its GELU (the tanh one), times the transposed weight, plus bias: x [...,I] -> [...,O] in x's
    dtype.

    weight8 float8_e4m3fn [O,I] and weight_scale float32 [O,1] from `quantise_rows`, bias [O] in x's dtype.
    fast: on Hopper sums stay in the tensor cores, where some 14 bits of them are kept. On CUDA x is bfloat16
    and both widths divide by 16. Has no gradients. Raises ValueError for anything else, and on a GPU without
    fp8.
    """
    return _fp8_linear(x, weight8, weight_scale, bias, gelu, fast)


class Fp8Linear(nn.Module):
    """An `nn.Linear` whose weight is kept in fp8; made from one, for inference only.

    gelu: of its input, before it is quantised; fast: see `fp8_linear`.
    """

    weight8: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, gelu: bool = False, fast: bool = False) -> None:
        super().__init__()
        self.gelu, self.fast = gelu, fast
        weight8, scale = quantise_rows(linear.weight.detach())
        self.register_buffer("weight8", weight8)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[...,I] -> [...,O]."""
        return fp8_linear(x, self.weight8, self.weight_scale, self.bias, gelu=self.gelu, fast=self.fast)

    def product(self, x: Quantised, dtype: torch.dtype) -> Tensor:
        """[...,I] of what is in fp8 already -> [...,O] in `dtype`."""
        return fp8_product(x, self.weight8, self.weight_scale, self.bias, self.fast, dtype)
