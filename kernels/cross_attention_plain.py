"""The Triton kernel of cross_attention.py for every GPU, dtype and shape.

Letters: B batch, S video tokens, T text tokens, N concepts, C concept tokens, A heads, E head width.

It does both attentions in one launch: it reads a tile of queries once, keeps one accumulator, and writes
once. That one accumulator suffices because the concepts' softmax is normalised before its values are added.
Where all of them fit into one tile, as they nearly always do, that costs nothing; where they do not, their
maxima and sums come from a first sweep over their keys. Concepts alone, and text, go by online softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .boxes import Boxed, allowed_keys, box_bits
from .common import INTERPRETED, launch, power_of_two, tl, triton

MAX_WIDTH = 128
"""The widest head that the kernel takes."""

FEW_QUERIES = 64 * 4 * 132
"""Up to so many, over all heads and batch rows, a program takes 64: four programs for each SM of an H100."""


@triton.jit
def _tile(
    pointer, rows, columns, row_stride, kept,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows [rows, BLOCK_E] of a matrix, zero where not kept."""
    inside = kept[:, None]
    if WIDTH != BLOCK_E:
        inside = inside & (columns < WIDTH)[None, :]
    tile = tl.load(pointer + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _kept(mask, first, count, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which of the keys first … first + BLOCK - 1 are there and not masked."""
    keys = first + tl.arange(0, BLOCK)
    kept = keys < count
    if HAS_MASK:
        kept = tl.load(mask + keys, mask=kept, other=0) != 0
    return kept


@triton.jit
def _concept_logits(
    q, row_scale, k, first, k_stride, kept, columns, bits,
    BLOCK_C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, EACH: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Base-2 logits [BLOCK_S, BLOCK_C], minus infinity where not kept, or outside of a box."""
    places = first + tl.arange(0, BLOCK_C)
    allowed = allowed_keys(kept, places, bits, EACH, BLOCK_N)
    keys = _tile(k, places, columns, k_stride, kept, WIDTH, BLOCK_E, UPCAST)
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * row_scale[:, None]
    return tl.where(allowed, logits, -float("inf"))


@triton.jit
def _attend(
    q, row_scale, k, v, k_stride, v_stride, mask, bias, count, last, columns, bits,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr,
    EACH: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention by online softmax to keys 0 … last - 1 of `count`; zero where all of them are masked, or
    outside of a box."""
    acc = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    top = tl.full([BLOCK_S], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, last, BLOCK):
        keys = first + tl.arange(0, BLOCK)
        kept = _kept(mask, first, count, BLOCK, HAS_MASK)
        tile = _tile(k, keys, columns, k_stride, kept, WIDTH, BLOCK_E, UPCAST)
        logits = tl.dot(q, tl.trans(tile), input_precision=PRECISION) * row_scale[:, None]
        if HAS_BIAS:  # exponentials are to base 2
            offsets = tl.load(bias + keys, mask=kept, other=0.0)
            logits += (offsets * 1.4426950408889634)[None, :]
        logits = tl.where(allowed_keys(kept, keys, bits, EACH, BLOCK_N), logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)  # nothing but masked keys so far
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights, 1)
        values = _tile(v, keys, columns, v_stride, kept, WIDTH, BLOCK_E, UPCAST)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def cross_attention_kernel(
    q, text_k, text_v, concept_k, concept_v, mask, inverse_rms, text_bias, boxes, out,
    S, T, C, A, logit_scale,
    q_b, q_s, q_a, tk_b, tk_t, tk_a, tv_b, tv_t, tv_a, ck_b, ck_c, ck_a, cv_b, cv_c, cv_a,
    mask_b, rms_b, bias_b, box_b, box_s, out_b, out_s, out_a,
    WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr, EACH: tl.constexpr, BLOCK_N: tl.constexpr, HAS_TEXT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_RMS: tl.constexpr, HAS_BIAS: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_S queries of one head of one batch row. `x_b`, `x_s`, … are strides in elements;
    EACH, BLOCK_N: see boxes.py."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_S
    batch = (tl.program_id(1) // A).to(tl.int64)
    head = tl.program_id(1) % A
    rows, columns = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)
    there = rows < S - start
    q = _tile(q + batch * q_b + start * q_s + head * q_a, rows, columns, q_s, there, WIDTH, BLOCK_E, UPCAST)
    row_scale = tl.full([BLOCK_S], logit_scale, tl.float32)
    if HAS_RMS:
        row_scale *= tl.load(inverse_rms + batch * rms_b + start + rows, mask=there, other=0.0)
    acc = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    bits = rows  # anything
    if EACH > 0:
        boxes += batch * box_b + start * box_s + rows[:, None] * box_s
        bits = box_bits(boxes, there, C // EACH, BLOCK_N)

    if HAS_TEXT:
        text_k += batch * tk_b + head * tk_a
        text_v += batch * tv_b + head * tv_a
        acc = _attend(
            q, row_scale, text_k, text_v, tk_t, tv_t, mask, text_bias + batch * bias_b, T, T, columns,
            bits, BLOCK_S, BLOCK_T, WIDTH, BLOCK_E, 0, 1, False, HAS_BIAS, PRECISION, UPCAST,
        )  # fmt: skip

    concept_k += batch * ck_b + head * ck_a
    concept_v += batch * cv_b + head * cv_a
    mask += batch * mask_b
    last = C  # behind the last concept token that is not masked: padding is not even read
    if HAS_MASK:
        last = 0
        for first in range(0, C, BLOCK_C):
            kept = _kept(mask, first, C, BLOCK_C, HAS_MASK)
            last = tl.maximum(last, tl.max(tl.where(kept, first + tl.arange(0, BLOCK_C) + 1, 0), 0))
    if BLOCK_C == 0:  # text alone
        pass
    elif ONE_BLOCK:
        if last > 0:
            kept = _kept(mask, 0, C, BLOCK_C, HAS_MASK)
            logits = _concept_logits(
                q, row_scale, concept_k, 0, ck_c, kept, columns, bits,
                BLOCK_C, WIDTH, BLOCK_E, EACH, BLOCK_N, PRECISION, UPCAST,
            )  # fmt: skip
            top = tl.max(logits, 1)
            if EACH > 0:
                top = tl.where(top == -float("inf"), 0.0, top)  # outside of every box
            weights = tl.exp2(logits - top[:, None])
            total = tl.sum(weights, 1)
            if EACH > 0:
                total = tl.where(total > 0, total, 1.0)
            weights *= (1.0 / total)[:, None]
            values = _tile(concept_v, tl.arange(0, BLOCK_C), columns, cv_c, kept, WIDTH, BLOCK_E, UPCAST)
            acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    elif not HAS_TEXT:
        acc = _attend(
            q, row_scale, concept_k, concept_v, ck_c, cv_c, mask, text_bias, C, last, columns,
            bits, BLOCK_S, BLOCK_C, WIDTH, BLOCK_E, EACH, BLOCK_N, HAS_MASK, False, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        top = tl.full([BLOCK_S], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_S], tl.float32)
        for first in range(0, last, BLOCK_C):
            kept = _kept(mask, first, C, BLOCK_C, HAS_MASK)
            logits = _concept_logits(
                q, row_scale, concept_k, first, ck_c, kept, columns, bits,
                BLOCK_C, WIDTH, BLOCK_E, EACH, BLOCK_N, PRECISION, UPCAST,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(logits, 1))
            finite = tl.where(higher == -float("inf"), 0.0, higher)  # nothing but masked keys so far
            total = total * tl.exp2(top - finite) + tl.sum(tl.exp2(logits - finite[:, None]), 1)
            top = higher
        gain = 1.0 / tl.where(total > 0, total, 1.0)
        if EACH > 0:
            top = tl.where(top == -float("inf"), 0.0, top)  # outside of every box
        for first in range(0, last, BLOCK_C):
            kept = _kept(mask, first, C, BLOCK_C, HAS_MASK)
            logits = _concept_logits(
                q, row_scale, concept_k, first, ck_c, kept, columns, bits,
                BLOCK_C, WIDTH, BLOCK_E, EACH, BLOCK_N, PRECISION, UPCAST,
            )  # fmt: skip
            weights = tl.exp2(logits - top[:, None]) * gain[:, None]
            values = _tile(
                concept_v, first + tl.arange(0, BLOCK_C), columns, cv_c, kept, WIDTH, BLOCK_E, UPCAST
            )
            acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)

    place = out + batch * out_b + start * out_s + head * out_a + rows[:, None] * out_s + columns[None, :]
    inside = there[:, None]
    if WIDTH != BLOCK_E:
        inside = inside & (columns < WIDTH)[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside)


def cross_attention_triton(
    out: Tensor,
    q: Tensor,
    text: tuple[Tensor, Tensor] | None,
    concepts: tuple[Tensor, Tensor] | None,
    mask: Tensor | None = None,
    inverse_rms: Tensor | None = None,
    text_bias: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Tensor:
    """Launches the kernel into `out` [B,S,A,E], contiguous, and returns it. text and concepts: (keys,
    values), one of them may be None.

    Tiles: 128 queries leave the accumulator 64 registers a thread at 8 warps; three stages of 64 keys fit
    beside them. Few queries get small tiles, to fill the GPU. In float32 a product is three products in tf32
    (float32 accuracy), whose operands need so many registers that wide heads take 16 queries at a time.
    """
    batch, tokens, heads, width = q.shape
    block_e = power_of_two(width, 16, MAX_WIDTH)
    if q.dtype == torch.float32:
        block_s, most, warps = (64, 32, 4) if block_e <= 64 else (16, 32, 8)
    else:
        few = tokens * batch * heads <= FEW_QUERIES
        block_s, most, warps = (64, 64, 4) if few else (128, 64, 8)
    texts, concepts, count = text or concepts, concepts or text, concepts[0].shape[1] if concepts else 0
    assert texts is not None and concepts is not None
    text_k, text_v, concept_k, concept_v = *texts, *concepts
    # any tensor: the kernel does not look at it
    masked, rms, bias = (q if tensor is None else tensor for tensor in (mask, inverse_rms, text_bias))
    block_t = power_of_two(text_k.shape[1], 16, most)
    block_c = power_of_two(count, 16, most) if count else 0
    boxed = Boxed.of(boxes, q, count)
    scale = math.log2(math.e) / math.sqrt(width)  # exponentials are to base 2
    text_strides, concept_strides = ((*k.stride()[:3], *v.stride()[:3]) for k, v in (texts, concepts))
    launch(
        cross_attention_kernel, (-(-tokens // block_s), batch * heads),
        q, text_k, text_v, concept_k, concept_v, masked, rms, bias, boxed.boxes, out,
        tokens, text_k.shape[1], count, heads, scale,
        *q.stride()[:3], *text_strides, *concept_strides,
        masked.stride(0), rms.stride(0), bias.stride(0), boxed.row_step, boxed.step, *out.stride()[:3],
        WIDTH=width, BLOCK_S=block_s, BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_E=block_e, EACH=boxed.each,
        BLOCK_N=boxed.block, HAS_TEXT=text is not None, HAS_MASK=mask is not None,
        HAS_RMS=inverse_rms is not None, HAS_BIAS=text_bias is not None, ONE_BLOCK=count <= block_c,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee", UPCAST=INTERPRETED,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    return out
