"""What stands between two products of a block, in one pass: residual, LayerNorm, scale and shift.

Letters: B batch, S tokens, D width.

A row is read once and stays in registers. Mean and variance are those of the row as it is written (rounded to
x's dtype), as if the two steps were separate, so that fusing changes nothing but the order of sums.

A product can add its result to what is carried on (`addmm`), but then not a bias, too. That bias may be added
beforehand, `later`: to the sum that is carried on, not to what is normalised.

Vectors are a batch row's, [B,D] or [1,D], or those of its tokens' F equal runs, one after the other, as where
each latent frame has a time of its own: [B,F,D] or [1,F,D].
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .common import TorchOp, launch, power_of_two, tl, triton, wide

# Reference.


def residual_reference(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + branch * gate in x's dtype, computed in float32 at least; gate [B or 1,D] or None for one."""
    added = wide(branch) if gate is None else wide(branch) * gate[:, None]
    return (wide(x) + added).type_as(x)  # [B,S,D]


def norm_reference(x: Tensor, scale: Tensor, shift: Tensor | None, plus_one: bool, eps: float) -> Tensor:
    """LayerNorm(x) * scale + shift in x's dtype; scale and shift [B or 1,D]."""
    factor = 1 + scale if plus_one else scale
    normed = F.layer_norm(wide(x), x.shape[-1:], eps=eps) * factor[:, None]  # [B,S,D]
    return (normed if shift is None else normed + shift[:, None]).type_as(x)  # [B,S,D]


def residual_modulate_reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    later: Tensor | None,
    plus_one: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`residual_modulate` in plain torch."""
    summed = residual_reference(x, branch, gate)  # [B,S,D]
    normed = norm_reference(summed, scale, shift, plus_one, eps)  # [B,S,D]
    return summed if later is None else summed + later, normed


def _by_run(x: Tensor, *vectors: Tensor | None) -> tuple[Tensor, list[Tensor | None], int]:
    """x and the vectors such that every batch row is a run of its own, and how many runs a row had."""
    runs = next((v.shape[1] for v in vectors if v is not None and v.dim() == 3), 1)
    if runs == 1 and all(v is None or v.dim() == 2 for v in vectors):
        return x, list(vectors), 1
    rows = [
        v if v is None or v.dim() == 2 else v.expand(len(x), -1, -1).flatten(0, 1)  # [B*F,D]
        for v in vectors
    ]
    return _in_runs(x, runs), rows, runs


def _in_runs(x: Tensor, runs: int) -> Tensor:
    """[B,S,D] -> [B*runs,S/runs,D]."""
    return x if runs == 1 else x.unflatten(1, (runs, -1)).flatten(0, 1)


# Triton.

MAX_WIDTH = 16384
"""The widest row that fits into a program's registers."""


@triton.jit
def modulate_kernel(
    x, branch, gate, scale, shift, later, summed, out,
    S, eps,
    x_b, x_s, branch_b, branch_s, gate_b, scale_b, shift_b,
    D: tl.constexpr, BLOCK: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_LATER: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """One program: one token. `summed` and `out` are contiguous; `x_b`, … are strides in elements."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // S, row % S
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    value = tl.load(x + batch * x_b + token * x_s + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        added = tl.load(branch + batch * branch_b + token * branch_s + columns, mask=inside, other=0.0)
        added = added.to(tl.float32)
        if HAS_GATE:
            added *= tl.load(gate + batch * gate_b + columns, mask=inside, other=0.0)
        value += added
        carried = value
        if HAS_LATER:
            carried += tl.load(later + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(summed + row * D + columns, carried.to(summed.dtype.element_ty), mask=inside)
        value = value.to(summed.dtype.element_ty).to(tl.float32)
    mean = tl.sum(value, 0) / D
    centred = tl.where(inside, value - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    factor = tl.load(scale + batch * scale_b + columns, mask=inside, other=0.0)
    if PLUS_ONE:
        factor += 1.0
    normed *= factor
    if HAS_SHIFT:
        normed += tl.load(shift + batch * shift_b + columns, mask=inside, other=0.0)
    tl.store(out + row * D + columns, normed.to(out.dtype.element_ty), mask=inside)


def modulate_triton(
    out: Tensor,
    summed: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    plus_one: bool,
    eps: float,
    later: Tensor | None = None,
) -> None:
    """Launches the kernel into `out` and, with a branch, `summed`: [B,S,D], contiguous.

    A token to a program: its row lies in the registers of 4 warps, 16 values a thread at D = 1536, or of 8.
    """
    batch, tokens, width = x.shape
    block = power_of_two(width, 128, MAX_WIDTH)
    vectors = [x if vector is None else vector for vector in (gate, scale, shift)]  # x: is not looked at
    steps = [0 if vector.shape[0] == 1 else vector.stride(0) for vector in vectors]
    added, target = (x if branch is None else branch), (out if summed is None else summed)
    vectors.append(x if later is None else later)
    launch(
        modulate_kernel, (batch * tokens,),
        x, added, *vectors, target, out, tokens, eps, *x.stride()[:2], *added.stride()[:2], *steps,
        D=width, BLOCK=block, HAS_BRANCH=branch is not None, HAS_GATE=gate is not None,
        HAS_SHIFT=shift is not None, HAS_LATER=later is not None, PLUS_ONE=plus_one,
        num_warps=4 if block <= 2048 else 8, num_stages=1,
    )  # fmt: skip


# The torch op.


def _cuda(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    later: Tensor | None,
    plus_one: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    summed, out = x.new_empty(x.shape), x.new_empty(x.shape)
    modulate_triton(out, summed, x, branch, gate, scale, shift, plus_one, eps, later)
    return summed, out  # [B,S,D] each


def _cuda_alone(x: Tensor, *norm: Any) -> Tensor:
    modulate_triton(out := x.new_empty(x.shape), None, x, None, None, *norm)
    return out  # [B,S,D]


_modulate = TorchOp(
    "modulate",
    "x BSD, scale wide bD, shift? wide bD",
    scalars="bool plus_one, float eps",
    reference=norm_reference,
    cuda=_cuda_alone,
    empty=lambda x, *_: x.new_empty(x.shape),
    limits={"D": MAX_WIDTH},
)
_residual_modulate = TorchOp(
    "residual_modulate",
    "x BSD, branch BSD, gate? wide bD, scale wide bD, shift? wide bD, later? D",
    scalars="bool plus_one, float eps",
    outputs=2,
    reference=residual_modulate_reference,
    cuda=_cuda,
    empty=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
    limits={"D": MAX_WIDTH},
)


def residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + branch * gate in plain torch, [B,S,D], where no norm follows; of what `residual_modulate` takes."""
    rows, (gate,), runs = _by_run(x, gate)
    return residual_reference(rows, _in_runs(branch, runs), gate).view_as(x)


def modulate(
    x: Tensor, scale: Tensor, shift: Tensor | None = None, *, plus_one: bool = True, eps: float = 1e-6
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift: adaLN; with plus_one=False, scale and shift are an affine norm's.

    x [B,S,D]; scale and shift float32 (float64 of float64), [B,D], [1,D], [B,F,D] or [1,F,D]. Returns [B,S,D]
    in x's dtype. Raises ValueError for other shapes, dtypes or devices.
    """
    rows, (scale_, shift_), _ = _by_run(x, scale, shift)
    return _modulate(rows, scale_, shift_, plus_one, eps).view_as(x)


def residual_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    later: Tensor | None = None,
    *,
    plus_one: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(x + branch * gate + later, and `modulate` of x + branch * gate), each [B,S,D]: what is carried on, and
    what the next part reads.

    branch [B,S,D], gate float32 as scale, None for one; later [D] in x's dtype: a bias of what will be
    added next; the rest as for `modulate`.
    """
    rows, vectors, runs = _by_run(x, gate, scale, shift)
    found = _residual_modulate(rows, _in_runs(branch, runs), *vectors, later, plus_one, eps)
    return found[0].view_as(x), found[1].view_as(x)
