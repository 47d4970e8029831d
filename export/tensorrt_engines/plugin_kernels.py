"""The concept attention's Triton kernel with the arguments in the order in which TensorRT passes them.

A plugin that was compiled ahead of time gets its input pointers, then whole numbers, then its output
pointers. It is the plain kernel: Hopper's (kernels/cross_attention_hopper.py) takes tensor maps, which the
host must encode, or the GPU into scratch memory, and such a plugin gets neither. The tensors are those of
concept_node.py, contiguous: q and out [B,S,D], keys and values [B,T|C,D], mask bool [B,C], text_bias float32
[B,T].
"""

from __future__ import annotations

from ...kernels.common import tl, triton
from ...kernels.cross_attention_plain import cross_attention_kernel


@triton.jit
def injection_entry(
    q, k, v, mask, S, C, out,
    A: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`ConceptInjection`: grid (tiles of S, B*A)."""
    D: tl.constexpr = A * WIDTH
    cross_attention_kernel(
        q, k, v, k, v, mask, q, q, out, S, C, C, A, SCALE,
        S * D, D, WIDTH, C * D, D, WIDTH, C * D, D, WIDTH, C * D, D, WIDTH, C * D, D, WIDTH,
        C, 0, 0, S * D, D, WIDTH,
        WIDTH, BLOCK_S, BLOCK_T, BLOCK_C, BLOCK_E, False, True, False, False, ONE_BLOCK, PRECISION, False,
    )  # fmt: skip


@triton.jit
def decoupled_entry(
    q, text_k, text_v, k, v, mask, S, T, C, out,
    A: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`DecoupledCrossAttention`: grid (tiles of S, B*A)."""
    D: tl.constexpr = A * WIDTH
    cross_attention_kernel(
        q, text_k, text_v, k, v, mask, q, q, out, S, T, C, A, SCALE,
        S * D, D, WIDTH, T * D, D, WIDTH, T * D, D, WIDTH, C * D, D, WIDTH, C * D, D, WIDTH,
        C, 0, 0, S * D, D, WIDTH,
        WIDTH, BLOCK_S, BLOCK_T, BLOCK_C, BLOCK_E, True, True, False, False, ONE_BLOCK, PRECISION, False,
    )  # fmt: skip


@triton.jit
def biased_entry(
    q, text_k, text_v, k, v, mask, text_bias, S, T, C, out,
    A: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`BiasedCrossAttention`: grid (tiles of S, B*A)."""
    D: tl.constexpr = A * WIDTH
    cross_attention_kernel(
        q, text_k, text_v, k, v, mask, q, text_bias, out, S, T, C, A, SCALE,
        S * D, D, WIDTH, T * D, D, WIDTH, T * D, D, WIDTH, C * D, D, WIDTH, C * D, D, WIDTH,
        C, 0, T, S * D, D, WIDTH,
        WIDTH, BLOCK_S, BLOCK_T, BLOCK_C, BLOCK_E, True, True, False, True, ONE_BLOCK, PRECISION, False,
    )  # fmt: skip
