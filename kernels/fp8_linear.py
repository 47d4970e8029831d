"""A linear layer in fp8: weights quantised once, activations on the way in, the product on 8-bit tensor
cores.

Letters: M tokens (any leading axes, flattened), I input width, O output width.

Both sides are float8_e4m3fn with float32 scales, one for each token and one for each output channel, so that
one large value spoils its own row only. The product is PyTorch's (`torch._scaled_mm`, cuBLAS); what is this
project's own is the kernel that finds a token's scale and quantises it while it is in registers. Part of the
opt-in tier `high`: its error is `RELATIVE_L2["linear8"]` in tolerances.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import INTERPRETED, TorchOp, launch, power_of_two, require, tl, to_fp8, triton

FP8_MAX = 448.0
"""The largest value of float8_e4m3fn."""
MAX_WIDTH = 16384
"""The widest row that fits into a program's registers."""

# Reference.


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., I] -> (float8_e4m3fn [..., I], float32 scales [..., 1]): x is the first times the second."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-8) / FP8_MAX  # [...,1]
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def fp8_linear_reference(x: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`fp8_linear` in plain torch, in float32."""
    x8, scale = quantise_rows(x)
    out = F.linear(x8.float() * scale, weight8.float() * weight_scale)  # [...,O]
    return (out if bias is None else out + bias.float()).type_as(x)


# Triton.


@triton.jit
def quantise_rows_kernel(x, out, scale, x_m, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """One program: one token."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_m + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(value), 0), 1e-8) / 448.0
    tl.store(out + row * WIDTH + columns, to_fp8(value / step, ROUND), mask=columns < WIDTH)
    tl.store(scale + row, step)


def quantise_rows_triton(out: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Launches the kernel into `out` float8_e4m3fn [M,I], `scale` float32 [M,1], contiguous; returns both."""
    rows, width = x.shape
    block = power_of_two(width, 128, MAX_WIDTH)
    launch(
        quantise_rows_kernel, (rows,), x, out, scale, x.stride(0),
        WIDTH=width, BLOCK=block, ROUND=INTERPRETED, num_warps=4 if block <= 2048 else 8, num_stages=1,
    )  # fmt: skip
    return out, scale


# The torch op.


def _check(x: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    op, shape = "fp8_linear", list(weight8.shape)
    require(op, x.dtype != torch.float64, "float64 is not for 8 bits")
    require(op, weight8.is_contiguous(), "weight8 is not contiguous: pass weight8.contiguous()")
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        message = f"fp8 needs compute capability 8.9 or newer, this GPU has {major}.{minor}: keep nn.Linear"
        require(op, (major, minor) >= (8, 9), message)
        require(op, x.dtype == torch.bfloat16, f"on CUDA x must be bfloat16, not {x.dtype}")
        sixteen = shape[0] % 16 == 0 and shape[1] % 16 == 0
        require(op, sixteen, f"on CUDA both widths must divide by 16, not {shape}: keep nn.Linear")


def _cuda(x: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])  # [M,I]
    x8 = rows.new_empty(rows.shape, dtype=torch.float8_e4m3fn)
    quantise_rows_triton(x8, scale := rows.new_empty((len(rows), 1), dtype=torch.float32), rows)
    out = torch._scaled_mm(
        x8, weight8.t(), scale_a=scale, scale_b=weight_scale.t(), bias=bias, out_dtype=x.dtype
    )  # [M,O]
    return out.reshape(*x.shape[:-1], -1)  # [...,O]


_fp8_linear = TorchOp(
    "fp8_linear",
    "x *I, weight8 fp8 OI, weight_scale float32 O1, bias? O",
    reference=fp8_linear_reference,
    cuda=_cuda,
    empty=lambda x, weight8, *_: x.new_empty((*x.shape[:-1], weight8.shape[0])),
    limits={"I": MAX_WIDTH},
    further=_check,
)


def fp8_linear(x: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x times the transposed weight, plus bias: x [...,I] -> [...,O] in x's dtype.

    weight8 float8_e4m3fn [O,I] and weight_scale float32 [O,1] from `quantise_rows`, bias [O] in x's dtype. On
    CUDA x is bfloat16 and both widths divide by 16. Has no gradients. Raises ValueError for anything else,
    and on a GPU without fp8.
    """
    return _fp8_linear(x, weight8, weight_scale, bias)


class Fp8Linear(nn.Module):
    """An `nn.Linear` whose weight is kept in fp8; made from one, for inference only."""

    weight8: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight8, scale = quantise_rows(linear.weight.detach())
        self.register_buffer("weight8", weight8)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[...,I] -> [...,O]."""
        return fp8_linear(x, self.weight8, self.weight_scale, self.bias)
