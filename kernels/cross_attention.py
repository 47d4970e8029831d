"""Cross-attention from video tokens to text and to concepts: reference, Triton kernel, torch op.

Letters: B batch, S video tokens, T text tokens, C concept tokens, A heads, E head width.

A masked key contributes exactly nothing: its softmax weight is an exact zero, so whatever (finite) content it
has, the result is the same bit for bit. A row without any key left gives exactly zero, never NaN.

The kernel does both attentions in one launch: it reads a tile of queries once, keeps one accumulator, and
writes once. That one accumulator suffices because the concepts' softmax is normalised before its values are
added: its maxima and sums come from a first sweep over the (few) concept keys. Where all of them fit into one
tile, as they nearly always do, there is nothing to sweep twice.

A key may stand for several equal ones: with log(m) added to its logit it counts m times. So padding, whose
tokens are all the same, is one key (`padding_bias`), and the keys behind it, at minus infinity, none.

A query's RMS norm runs over all heads, but a program sees one head. What is left of the norm inside the
kernel is one number per token: the norm's weight belongs to the keys (fold it into them once per request),
and 1/rms scales a row of logits. So the normalised queries need never be written: `inverse_rms` reads them
once, and the kernel takes its [B,S] numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import INTERPRETED, TorchOp, launch, power_of_two, tl, triton

# Reference.


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(E), over the keys that the mask allows.

    q [B,S,A,E], k and v [B,T,A,E], mask bool [B,T] (True: attend; None: every key), bias float32 [B,T]
    (float64 of float64): added to the logits of every query and head; minus infinity takes a key away, but
    not a row's last one. Returns [B,S,A,E] in q's dtype. A batch row whose mask is all False returns zero.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B,A,S|T,E]
    if mask is None and bias is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [B,S,A,E]
    some = mask.any(dim=-1, keepdim=True) if mask is not None else None  # [B,1]
    # A row with no key would be 0/0: let it attend to everything, then replace what came out.
    allowed = mask | ~some if mask is not None and some is not None else None  # [B,T]
    if bias is not None:
        bias = bias if allowed is None else bias.masked_fill(~allowed, -math.inf)
        allowed = bias.to(q.dtype)  # [B,T]
    assert allowed is not None
    # ONNX Runtime's Attention wants a mask with an entry for every query.
    allowed = allowed[:, None, None].expand(-1, -1, q.shape[2], -1)  # [B,1,S,T]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # [B,A,S,E]
    out = out if some is None else torch.where(some[:, :, None, None], out, 0.0)  # [B,A,S,E]
    return out.transpose(1, 2)  # [B,S,A,E]


def decoupled_cross_attention_reference(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    concept_k: Tensor,
    concept_v: Tensor,
    concept_mask: Tensor | None = None,
    inverse_rms: Tensor | None = None,
    text_bias: Tensor | None = None,
) -> Tensor:
    """`decoupled_cross_attention` in plain torch; for what inverse_rms and text_bias are, see there."""
    if inverse_rms is not None:
        q = (q * inverse_rms[:, :, None, None]).type_as(q)  # [B,S,A,E]
    text = attention(q, text_k, text_v, bias=text_bias)  # [B,S,A,E]
    return text + attention(q, concept_k, concept_v, concept_mask)  # [B,S,A,E]


def padding_bias(counts: Tensor, kept: int, tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The bias [B,kept] with which `kept` keys are `tokens` keys, of which all but the first n are equal.

    counts int64 [B]: n of each row, tokens = n or n < kept. 0 for a real token, log(tokens - n) for the key
    behind them, which stands for all padding, minus infinity behind it: these must hold anything finite.
    """
    place = torch.arange(kept, device=counts.device)[None]  # [1,kept]
    n = counts[:, None]  # [B,1]
    padding = (tokens - n).clamp(min=1).to(torch.float64).log()  # [B,1]
    behind = torch.where(place == n, padding, -math.inf)  # [B,kept]
    return torch.where(place < n, 0.0, behind).to(dtype)


# Triton.

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
def _kept_concepts(mask, first, C, BLOCK_C: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which of the concept tokens first … first + BLOCK_C are there and not masked."""
    concepts = first + tl.arange(0, BLOCK_C)
    kept = concepts < C
    if HAS_MASK:
        kept = tl.load(mask + concepts, mask=kept, other=0) != 0
    return kept


@triton.jit
def _concept_logits(
    q, row_scale, k, first, k_stride, kept, columns,
    BLOCK_C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Base-2 logits [BLOCK_S, BLOCK_C], minus infinity where not kept."""
    keys = _tile(k, first + tl.arange(0, BLOCK_C), columns, k_stride, kept, WIDTH, BLOCK_E, UPCAST)
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * row_scale[:, None]
    return tl.where(kept[None, :], logits, -float("inf"))


@triton.jit
def cross_attention_kernel(
    q, text_k, text_v, concept_k, concept_v, mask, inverse_rms, text_bias, out,
    S, T, C, A, logit_scale,
    q_b, q_s, q_a, tk_b, tk_t, tk_a, tv_b, tv_t, tv_a, ck_b, ck_c, ck_a, cv_b, cv_c, cv_a,
    mask_b, rms_b, bias_b, out_b, out_s, out_a,
    WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_S queries of one head of one batch row. `x_b`, `x_s`, … are strides in elements."""
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

    if HAS_TEXT:
        text_k += batch * tk_b + head * tk_a
        text_v += batch * tv_b + head * tv_a
        top = tl.full([BLOCK_S], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_S], tl.float32)
        for first in range(0, T, BLOCK_T):
            tokens = first + tl.arange(0, BLOCK_T)
            kept = tokens < T
            keys = _tile(text_k, tokens, columns, tk_t, kept, WIDTH, BLOCK_E, UPCAST)
            logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * row_scale[:, None]
            if HAS_BIAS:  # exponentials are to base 2
                bias = tl.load(text_bias + batch * bias_b + tokens, mask=kept, other=0.0)
                logits += (bias * 1.4426950408889634)[None, :]
            logits = tl.where(kept[None, :], logits, -float("inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            values = _tile(text_v, tokens, columns, tv_t, kept, WIDTH, BLOCK_E, UPCAST)
            acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
            top = higher
        acc = acc / total[:, None]

    concept_k += batch * ck_b + head * ck_a
    concept_v += batch * cv_b + head * cv_a
    mask += batch * mask_b
    last = C  # behind the last concept token that is not masked: padding is not even read
    if HAS_MASK:
        last = 0
        for first in range(0, C, BLOCK_C):
            kept = _kept_concepts(mask, first, C, BLOCK_C, HAS_MASK)
            last = tl.maximum(last, tl.max(tl.where(kept, first + tl.arange(0, BLOCK_C) + 1, 0), 0))
    if BLOCK_C == 0:  # text alone
        pass
    elif ONE_BLOCK:
        if last > 0:
            kept = _kept_concepts(mask, 0, C, BLOCK_C, HAS_MASK)
            logits = _concept_logits(
                q, row_scale, concept_k, 0, ck_c, kept, columns, BLOCK_C, WIDTH, BLOCK_E, PRECISION, UPCAST
            )
            weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
            weights *= (1.0 / tl.sum(weights, 1))[:, None]
            values = _tile(concept_v, tl.arange(0, BLOCK_C), columns, cv_c, kept, WIDTH, BLOCK_E, UPCAST)
            acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    else:
        top = tl.full([BLOCK_S], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_S], tl.float32)
        for first in range(0, last, BLOCK_C):
            kept = _kept_concepts(mask, first, C, BLOCK_C, HAS_MASK)
            logits = _concept_logits(
                q, row_scale, concept_k, first, ck_c, kept, columns,
                BLOCK_C, WIDTH, BLOCK_E, PRECISION, UPCAST,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(logits, 1))
            finite = tl.where(higher == -float("inf"), 0.0, higher)  # nothing but masked keys so far
            total = total * tl.exp2(top - finite) + tl.sum(tl.exp2(logits - finite[:, None]), 1)
            top = higher
        gain = 1.0 / tl.where(total > 0, total, 1.0)
        for first in range(0, last, BLOCK_C):
            kept = _kept_concepts(mask, first, C, BLOCK_C, HAS_MASK)
            logits = _concept_logits(
                q, row_scale, concept_k, first, ck_c, kept, columns,
                BLOCK_C, WIDTH, BLOCK_E, PRECISION, UPCAST,
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
    scale = math.log2(math.e) / math.sqrt(width)  # exponentials are to base 2
    text_strides, concept_strides = ((*k.stride()[:3], *v.stride()[:3]) for k, v in (texts, concepts))
    launch(
        cross_attention_kernel, (-(-tokens // block_s), batch * heads),
        q, text_k, text_v, concept_k, concept_v, masked, rms, bias, out,
        tokens, text_k.shape[1], count, heads, scale,
        *q.stride()[:3], *text_strides, *concept_strides,
        masked.stride(0), rms.stride(0), bias.stride(0), *out.stride()[:3],
        WIDTH=width, BLOCK_S=block_s, BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_E=block_e,
        HAS_TEXT=text is not None, HAS_MASK=mask is not None, HAS_RMS=inverse_rms is not None,
        HAS_BIAS=text_bias is not None, ONE_BLOCK=count <= block_c,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee", UPCAST=INTERPRETED,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    return out


# The torch op.


def _alike(q: Tensor, *others: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)  # [B,S,A,E]


_decoupled = TorchOp(
    "decoupled_cross_attention",
    "q BSAE, text_k BTAE, text_v BTAE, concept_k BCAE, concept_v BCAE, concept_mask? bool BC, "
    "inverse_rms? wide BS, text_bias? wide BT",
    reference=decoupled_cross_attention_reference,
    cuda=lambda q, tk, tv, ck, cv, *rest: cross_attention_triton(_alike(q), q, (tk, tv), (ck, cv), *rest),
    empty=_alike,
    limits={"E": MAX_WIDTH},
    one_node=True,
)
_injection = TorchOp(
    "concept_injection",
    "q BSAE, concept_k BCAE, concept_v BCAE, concept_mask? bool BC",
    reference=attention,
    cuda=lambda q, k, v, mask: cross_attention_triton(_alike(q), q, None, (k, v), mask),
    empty=_alike,
    limits={"E": MAX_WIDTH},
    one_node=True,
)
_biased = TorchOp(
    "biased_attention",
    "q BSAE, k BTAE, v BTAE, bias wide BT",
    reference=lambda q, k, v, bias: attention(q, k, v, bias=bias),
    cuda=lambda q, k, v, bias: cross_attention_triton(_alike(q), q, (k, v), None, text_bias=bias),
    empty=_alike,
    limits={"E": MAX_WIDTH},
)


def text_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`attention` without a mask. With a bias it is the Triton kernel on CUDA, which adds it in float32."""
    return attention(q, k, v) if bias is None else _biased(q, k, v, bias)


def concept_injection(
    q: Tensor, concept_k: Tensor, concept_v: Tensor, concept_mask: Tensor | None = None
) -> Tensor:
    """Attention of video queries to concept tokens: the core of ConceptMaster's injector (arXiv 2501.04698).

    q [B,S,A,E], concept_k and concept_v [B,C,A,E], concept_mask bool [B,C]. Returns [B,S,A,E]; exactly zero
    for a batch row whose concepts are all masked. Raises ValueError for other shapes, mixed dtypes or
    devices, or a last axis that is not contiguous.
    """
    return _injection(q, concept_k, concept_v, concept_mask)


def decoupled_cross_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    concept_k: Tensor,
    concept_v: Tensor,
    concept_mask: Tensor | None = None,
    inverse_rms: Tensor | None = None,
    text_bias: Tensor | None = None,
) -> Tensor:
    """One query, two sets of keys, each with its own softmax; outputs summed (IP-Adapter, arXiv 2308.06721).

    q [B,S,A,E], text_k and text_v [B,T,A,E], concept_k and concept_v [B,C,A,E], concept_mask bool [B,C]
    (True: attend). Returns attention(text) + attention(concepts), [B,S,A,E]; a weight of the concepts belongs
    into their values. Text is never masked, as in Wan.

    inverse_rms, for queries that are not normalised yet: their `qk_norm_rope.inverse_rms`, float32 [B,S]
    (float64 of float64). The norm's weight must be in the keys already: k * weight.

    text_bias, for text whose padding is one key: float32 [B,T] (float64 of float64), see `attention` and
    `padding_bias`.
    Raises ValueError as `concept_injection`.
    """
    return _decoupled(q, text_k, text_v, concept_k, concept_v, concept_mask, inverse_rms, text_bias)
