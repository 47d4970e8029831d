"""The injector with its output projection folded into the concepts' values, once per request.

Letters: B batch, S video tokens, C concept tokens, A heads, E head width, D = A*E.

Keys and values do not change during a request, so W_O can be multiplied into the values:

    x + sum over a, c of p_ac (W_Oa v_ac)   instead of   x + W_O (sum over c of p_ac v_ac)

A token costs D*D multiplications in a projection, A*C*D in its folded form, which also does the attention's
own C*D: folding wins where A*C < D + C, for many heads where C < E (`absorbing_wins`). At Wan2.1's E = 128
and 16 tokens for each of 4 concepts it halves a projection. The queries' projection cannot be folded so:
behind it stands a norm over all of its output.

The kernel holds a head's logits in registers through its softmax, so only probabilities [S,A*C] are written;
the second thin product is `baddbmm_`, which adds itself to the residual where it lies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .boxes import Boxed, allowed_keys, beyond_a_word, box_bits, by_query, check_boxes
from .common import INTERPRETED, TorchOp, launch, power_of_two, tl, triton, wide

MAX_CONCEPT_TOKENS = 256
"""A head's probabilities lie in one tile."""


def absorbing_wins(concept_tokens: int, heads: int, head_width: int) -> bool:
    """Whether folding a projection into the concepts saves multiplications."""
    return heads * concept_tokens < heads * head_width + concept_tokens


def absorbed_values(v: Tensor, weight: Tensor) -> Tensor:
    """Values that went through the output projection: v [B,C,A,E], weight [D,D] -> [B,A*C,D]."""
    return torch.einsum("bcae,dae->bacd", v, weight.unflatten(1, v.shape[2:])).flatten(1, 2)


# Reference.


def concept_weights_reference(q: Tensor, k: Tensor, mask: Tensor | None, boxes: Tensor | None) -> Tensor:
    """`concept_weights` in plain torch."""
    logits = torch.einsum("bsae,bcae->bsac", wide(q), wide(k)) * q.shape[-1] ** -0.5  # [B,S,A,C]
    if mask is None and boxes is None:
        return logits.softmax(dim=-1).flatten(2).type_as(q)  # [B,S,A*C]
    if boxes is not None:
        allowed = by_query(boxes, mask, k.shape[1])[:, :, None]  # [B or 1,S,1,C]
    else:
        assert mask is not None
        allowed = mask[:, None, None]  # [B,1,1,C]
    some = allowed.any(dim=-1, keepdim=True)  # [B or 1,S or 1,1,1]
    logits = logits.masked_fill(~(allowed | ~some), -math.inf)
    weights = torch.where(some, logits.softmax(dim=-1), 0.0)
    return weights.flatten(2).type_as(q)  # [B,S,A*C]


# Triton.


@triton.jit
def concept_weights_kernel(
    q, k, mask, boxes, out,
    S, C, A, scale, q_b, q_s, q_a, k_b, k_c, k_a, mask_b, box_b, box_s,
    WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
    EACH: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_S tokens of one head, all concept tokens. `out` [B,S,A*C] is contiguous; EACH,
    BLOCK_N: see boxes.py."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_S
    batch, head = (tl.program_id(1) // A).to(tl.int64), tl.program_id(1) % A
    rows, concepts, columns = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    there, kept = rows < S - start, concepts < C
    if HAS_MASK:
        kept = tl.load(mask + batch * mask_b + concepts, mask=kept, other=0) != 0
    q += batch * q_b + start * q_s + head * q_a
    k += batch * k_b + head * k_a
    logits = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, WIDTH, BLOCK_E):
        inside = (first + columns < WIDTH)[None, :]
        queries = tl.load(
            q + rows[:, None] * q_s + first + columns[None, :], mask=there[:, None] & inside, other=0.0
        )
        keys = tl.load(
            k + concepts[:, None] * k_c + first + columns[None, :], mask=kept[:, None] & inside, other=0.0
        )
        if UPCAST:
            queries, keys = queries.to(tl.float32), keys.to(tl.float32)
        logits = tl.dot(queries, tl.trans(keys), logits, input_precision=PRECISION)
    bits = rows  # anything
    if EACH > 0:
        boxes += batch * box_b + start * box_s + rows[:, None] * box_s
        bits = box_bits(boxes, there, C // EACH, BLOCK_N)
    allowed = allowed_keys(kept, concepts, bits, EACH, BLOCK_N)
    logits = tl.where(allowed, logits * scale, -float("inf"))
    top = tl.max(logits, 1)
    weights = tl.exp2(logits - tl.where(top == -float("inf"), 0.0, top)[:, None])
    total = tl.sum(weights, 1)
    weights = weights / tl.where(total > 0, total, 1.0)[:, None]
    place = out + ((batch * S + start + rows)[:, None] * A + head) * C + concepts[None, :]
    tl.store(place, weights.to(out.dtype.element_ty), mask=there[:, None] & (concepts < C)[None, :])


def concept_weights_triton(
    out: Tensor, q: Tensor, k: Tensor, mask: Tensor | None, boxes: Tensor | None = None
) -> Tensor:
    """Launches the kernel into `out` [B,S,A*C], contiguous, and returns it."""
    batch, tokens, heads, width = q.shape
    concepts = k.shape[1]
    wide = q.dtype == torch.float32
    block_c, block_e = power_of_two(concepts, 16, MAX_CONCEPT_TOKENS), power_of_two(width, 16, 64)
    block_s = 16 if wide and block_c > 64 else 64 if wide or block_c > 64 else 128
    boxed = Boxed.of(boxes, q, concepts)
    masked = q if mask is None else mask  # any tensor: the kernel does not look at it
    launch(
        concept_weights_kernel, (-(-tokens // block_s), batch * heads), q, k, masked, boxed.boxes, out,
        tokens, concepts, heads, math.log2(math.e) / math.sqrt(width), *q.stride()[:3], *k.stride()[:3],
        masked.stride(0), boxed.row_step, boxed.step,
        WIDTH=width, BLOCK_S=block_s, BLOCK_C=block_c, BLOCK_E=block_e, EACH=boxed.each, BLOCK_N=boxed.block,
        HAS_MASK=mask is not None, PRECISION="tf32x3" if wide else "ieee", UPCAST=INTERPRETED,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


# The torch op.


def _empty(q: Tensor, k: Tensor, *allowed: Tensor | None) -> Tensor:
    return q.new_empty((*q.shape[:2], q.shape[2] * k.shape[1]))  # [B,S,A*C]


def _cuda(q: Tensor, k: Tensor, mask: Tensor | None, boxes: Tensor | None) -> Tensor:
    if beyond_a_word(boxes):
        return concept_weights_reference(q, k, mask, boxes)
    return concept_weights_triton(_empty(q, k), q, k, mask, boxes)


_weights = TorchOp(
    "concept_weights",
    "q BSAE, k BCAE, mask? bool BC, boxes? bool bSN",
    reference=concept_weights_reference,
    cuda=_cuda,
    empty=_empty,
    further=lambda q, k, mask, boxes: check_boxes("concept_weights", k, boxes),
    limits={"C": MAX_CONCEPT_TOKENS},
)


def concept_weights(q: Tensor, k: Tensor, mask: Tensor | None = None, boxes: Tensor | None = None) -> Tensor:
    """Each head's softmax over the concept tokens, beside each other: q [B,S,A,E], k [B,C,A,E] -> [B,S,A*C].

    mask bool [B,C], boxes bool [B or 1,S,N], see boxes.py. Exactly zero where one of them says so, also for
    all keys of a token. Raises ValueError for other shapes, mixed dtypes or devices, and more than
    `MAX_CONCEPT_TOKENS`.
    """
    return _weights(q, k, mask, boxes)


def absorbed_injection(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Tensor:
    """Adds W_O attention(q, k, v) to x, in place, and returns it; W_O is in the values already.

    x [B,S,D], q normalised [B,S,A,E], k [B,C,A,E], values [B,A*C,D] from `absorbed_values`, mask bool [B,C],
    boxes bool [B or 1,S,N]. A batch row whose concepts are all masked stays exactly as it is, and so does a
    token outside of all boxes.
    """
    return x.baddbmm_(concept_weights(q, k, mask, boxes), values)  # [B,S,D]
