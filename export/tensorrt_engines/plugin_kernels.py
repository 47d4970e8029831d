"""The concept attention's Triton kernel with the arguments in the order in which TensorRT passes them.

A plugin that was compiled ahead of time gets its input pointers, then whole numbers, then its output
pointers. It is the plain kernel: Hopper's (kernels/cross_attention_hopper.py) takes tensor maps, which the
host must encode, or the GPU into scratch memory, and such a plugin gets neither. The tensors are those of
concept_node.py, contiguous: q and out [B,S,D], keys and values [B,T|C,D], mask bool [B,C], text_bias float32
[B,T], boxes bool [1,S,N]; EACH is C // N, 0 without boxes.
"""

from __future__ import annotations

from ...kernels.common import tl, triton
from ...kernels.cross_attention_plain import cross_attention_kernel


@triton.jit
def _attend(
    q, text_k, text_v, k, v, mask, text_bias, boxes, S, T, C, out,
    A: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, EACH: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The kernel, with the strides of contiguous tensors: grid (tiles of S, B*A)."""
    D: tl.constexpr = A * WIDTH
    LEAST: tl.constexpr = 1 if EACH == 0 else EACH
    cross_attention_kernel(
        q, text_k, text_v, k, v, mask, q, text_bias, boxes, out, S, T, C, A, SCALE,
        S * D, D, WIDTH, T * D, D, WIDTH, T * D, D, WIDTH, C * D, D, WIDTH, C * D, D, WIDTH,
        C, 0, T, 0, C // LEAST, S * D, D, WIDTH,
        WIDTH, BLOCK_S, BLOCK_T, BLOCK_C, BLOCK_E, EACH, BLOCK_N,
        HAS_TEXT, True, False, HAS_BIAS, ONE_BLOCK, PRECISION, False,
    )  # fmt: skip


@triton.jit
def injection_entry(
    q, k, v, mask, S, C, out,
    A: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, EACH: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`ConceptInjection`."""
    _attend(
        q, k, v, k, v, mask, q, q, S, C, C, out,
        A, WIDTH, SCALE, BLOCK_S, BLOCK_T, BLOCK_C, BLOCK_E, EACH, BLOCK_N, ONE_BLOCK, PRECISION,
        False, False,
    )  # fmt: skip


@triton.jit
def decoupled_entry(
    q, text_k, text_v, k, v, mask, S, T, C, out,
    A: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, EACH: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`DecoupledCrossAttention`."""
    _attend(
        q, text_k, text_v, k, v, mask, q, q, S, T, C, out,
        A, WIDTH, SCALE, BLOCK_S, BLOCK_T, BLOCK_C, BLOCK_E, EACH, BLOCK_N, ONE_BLOCK, PRECISION,
        True, False,
    )  # fmt: skip


@triton.jit
def biased_entry(
    q, text_k, text_v, k, v, mask, text_bias, S, T, C, out,
    A: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, EACH: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`BiasedCrossAttention`."""
    _attend(
        q, text_k, text_v, k, v, mask, text_bias, q, S, T, C, out,
        A, WIDTH, SCALE, BLOCK_S, BLOCK_T, BLOCK_C, BLOCK_E, EACH, BLOCK_N, ONE_BLOCK, PRECISION,
        True, True,
    )  # fmt: skip


@triton.jit
def boxed_injection_entry(
    q, k, v, mask, boxes, S, C, out,
    A: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, EACH: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`BoxedConceptInjection`."""
    _attend(
        q, k, v, k, v, mask, q, boxes, S, C, C, out,
        A, WIDTH, SCALE, BLOCK_S, BLOCK_T, BLOCK_C, BLOCK_E, EACH, BLOCK_N, ONE_BLOCK, PRECISION,
        False, False,
    )  # fmt: skip


@triton.jit
def boxed_decoupled_entry(
    q, text_k, text_v, k, v, mask, boxes, S, T, C, out,
    A: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, EACH: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`BoxedDecoupledCrossAttention`."""
    _attend(
        q, text_k, text_v, k, v, mask, q, boxes, S, T, C, out,
        A, WIDTH, SCALE, BLOCK_S, BLOCK_T, BLOCK_C, BLOCK_E, EACH, BLOCK_N, ONE_BLOCK, PRECISION,
        True, False,
    )  # fmt: skip


@triton.jit
def boxed_biased_entry(
    q, text_k, text_v, k, v, mask, text_bias, boxes, S, T, C, out,
    A: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, EACH: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`BoxedBiasedCrossAttention`."""
    _attend(
        q, text_k, text_v, k, v, mask, text_bias, boxes, S, T, C, out,
        A, WIDTH, SCALE, BLOCK_S, BLOCK_T, BLOCK_C, BLOCK_E, EACH, BLOCK_N, ONE_BLOCK, PRECISION,
        True, True,
    )  # fmt: skip
