"""The injector with projections folded into the concepts' keys and values, once per request.

Letters: B batch, S video tokens, C concept tokens, A heads, E head width, D = A*E.

Keys and values do not change during a request, so W_Q can be multiplied into the keys and W_O into the
values:

    logits of head a   h·(W_Qa^T k_ac) + b_Qa·k_ac         instead of   (W_Q h + b_Q)_a·k_ac
    output             x + sum over a, c of p_ac (W_Oa v_ac)   instead of   x + W_O (sum over c of p_ac v_ac)

A token costs D*D multiplications in a projection, A*C*D in its folded form, which also does the attention's
own C*D: folding wins where A*C < D + C, for many heads where C < E (`absorbing_wins`). At Wan2.1's E = 128
and 16 tokens for each of 4 concepts it halves a projection.

With Wan's norm of the queries the first line gains nothing: 1/rms is over all of W_Q h, so that W_Q h has to
be computed all the same. There only the output is folded, and the weights come from queries and keys as they
are. One kernel does
both: without a norm, h takes the place of every head's query (a view with stride zero over the heads). It
holds a head's logits in registers through its softmax, so only probabilities [S,A*C] are written; the second
thin product is `torch.baddbmm`, which adds the residual as it ends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common import INTERPRETED, launch, require, require_alike, served, tl, triton

MAX_CONCEPT_TOKENS = 256
"""A head's probabilities lie in one tile."""


def absorbing_wins(concept_tokens: int, heads: int, head_width: int) -> bool:
    """Whether folding a projection into the concepts saves multiplications."""
    return heads * concept_tokens < heads * head_width + concept_tokens


def absorbed_keys(k: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keys for h instead of queries, for an injector without query norm.

    k [B,C,A,E], weight [D,D] and bias [D] of the query projection. Returns keys [B,C,A,D], and what is added
    to their products, [B,A,C] (None without bias).
    """
    split = k.shape[2:]
    keys = torch.einsum("bcae,aed->bcad", k, weight.unflatten(0, split))  # [B,C,A,D]
    return keys, None if bias is None else torch.einsum(
        "bcae,ae->bac", k, bias.unflatten(0, split)
    )  # [B,A,C]


def absorbed_values(v: Tensor, weight: Tensor) -> Tensor:
    """Values that went through the output projection: v [B,C,A,E], weight [D,D] -> [B,A*C,D]."""
    return torch.einsum("bcae,dae->bacd", v, weight.unflatten(1, v.shape[2:])).flatten(1, 2)


# Reference.


def concept_weights_reference(
    q: Tensor, k: Tensor, mask: Tensor | None, offset: Tensor | None, scale: float
) -> Tensor:
    """`concept_weights` in plain torch."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("bsae,bcae->bsac", q.to(wide), k.to(wide))  # [B,S,A,C]
    if offset is not None:
        logits = logits + offset.to(wide)[:, None]
    logits = logits * scale
    if mask is None:
        return logits.softmax(dim=-1).flatten(2).type_as(q)  # [B,S,A*C]
    some = mask.any(dim=-1, keepdim=True)  # [B,1]
    logits = logits.masked_fill(~(mask | ~some)[:, None, None], -math.inf)
    weights = torch.where(some[:, :, None, None], logits.softmax(dim=-1), 0.0)
    return weights.flatten(2).type_as(q)  # [B,S,A*C]


# Triton.


@triton.jit
def concept_weights_kernel(
    q, k, mask, offset, out,
    S, C, A, scale, q_b, q_s, q_a, k_b, k_c, k_a, mask_b, offset_b, offset_a,
    WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_OFFSET: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_S tokens of one head, all concept tokens. `out` [B,S,A*C] is contiguous."""
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
    if HAS_OFFSET:
        added = tl.load(offset + batch * offset_b + head * offset_a + concepts, mask=kept, other=0.0)
        logits += added.to(tl.float32)[None, :]
    logits = tl.where(kept[None, :], logits * scale, -float("inf"))
    top = tl.max(logits, 1)
    weights = tl.exp2(logits - tl.where(top == -float("inf"), 0.0, top)[:, None])
    total = tl.sum(weights, 1)
    weights = weights / tl.where(total > 0, total, 1.0)[:, None]
    place = out + ((batch * S + start + rows)[:, None] * A + head) * C + concepts[None, :]
    tl.store(place, weights.to(out.dtype.element_ty), mask=there[:, None] & (concepts < C)[None, :])


def concept_weights_triton(
    out: Tensor, q: Tensor, k: Tensor, mask: Tensor | None, offset: Tensor | None, scale: float
) -> Tensor:
    """Launches the kernel into `out` [B,S,A*C], contiguous, and returns it."""
    batch, tokens, heads, width = q.shape
    concepts = k.shape[1]
    wide = q.dtype == torch.float32
    block_c = max(16, 1 << (concepts - 1).bit_length())
    block_e = min(64, max(16, 1 << (width - 1).bit_length()))
    block_s = 16 if wide and block_c > 64 else 64 if wide or block_c > 64 else 128
    masked, added = (q if extra is None else extra for extra in (mask, offset))
    launch(
        concept_weights_kernel, (-(-tokens // block_s), batch * heads), q, k, masked, added, out,
        tokens, concepts, heads, scale * math.log2(math.e), *q.stride()[:3], *k.stride()[:3],
        masked.stride(0), *added.stride()[:2],
        WIDTH=width, BLOCK_S=block_s, BLOCK_C=block_c, BLOCK_E=block_e,
        HAS_MASK=mask is not None, HAS_OFFSET=offset is not None, PRECISION="tf32x3" if wide else "ieee",
        UPCAST=INTERPRETED, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


# The torch op.


def _check(q: Tensor, k: Tensor, mask: Tensor | None, offset: Tensor | None) -> None:
    """Raises ValueError with one line that says what is wrong."""
    op = "concept_weights"
    require_alike(op, q=q, k=k, offset=offset)
    require(op, q.dim() == 4 and q.numel() > 0, f"q must be [B,S,A,E], not {list(q.shape)}")
    batch, _, heads, width = q.shape
    fits = k.dim() == 4 and k.shape[::2] == q.shape[::2] and k.shape[3] == width and k.shape[1] > 0
    require(op, fits, f"k must be [{batch},C,{heads},{width}] beside this q, not {list(k.shape)}")
    concepts = k.shape[1]
    most = f"at most {MAX_CONCEPT_TOKENS} concept tokens, not {concepts}: take concept_injection"
    require(op, concepts <= MAX_CONCEPT_TOKENS, most)
    if mask is not None:
        right = mask.dtype == torch.bool and mask.shape == (batch, concepts) and mask.device == q.device
        require(op, right and mask.stride(-1) <= 1, f"mask must be bool [{batch},{concepts}] on {q.device}")
    if offset is not None:
        fits = offset.shape == (batch, heads, concepts)
        require(op, fits, f"offset must be [{batch},{heads},{concepts}], not {list(offset.shape)}")


@torch.library.custom_op(
    "conceptmaster::concept_weights",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor q, Tensor k, Tensor? mask, Tensor? offset, float scale) -> Tensor",
)
def _weights_op(q, k, mask, offset, scale):
    _check(q, k, mask, offset)
    return concept_weights_reference(q, k, mask, offset, scale)  # [B,S,A*C]


@_weights_op.register_kernel("cuda")
def _(q, k, mask, offset, scale):
    _check(q, k, mask, offset)
    out = q.new_empty((*q.shape[:2], q.shape[2] * k.shape[1]))
    return concept_weights_triton(out, q, k, mask, offset, scale)


@_weights_op.register_fake
def _(q, k, mask, offset, scale):
    _check(q, k, mask, offset)
    return q.new_empty((*q.shape[:2], q.shape[2] * k.shape[1]))


def concept_weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    offset: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Each head's softmax over the concept tokens, beside each other: q [B,S,A,E], k [B,C,A,E] -> [B,S,A*C].

    mask bool [B,C]; offset [B,A,C] is added to the products; scale: 1/sqrt(E) unless given. Exactly zero
    where masked, and for a batch row whose concepts are all masked. Raises ValueError for other shapes, mixed
    dtypes or devices, and more than `MAX_CONCEPT_TOKENS`.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if served(q, k, offset):
        return _weights_op(q, k, mask, offset, factor)
    _check(q, k, mask, offset)
    return concept_weights_reference(q, k, mask, offset, factor)


def absorbed_injection(x: Tensor, q: Tensor, k: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """x + W_O attention(q, k, v), W_O in the values already.

    x [B,S,D], q normalised [B,S,A,E], k [B,C,A,E], values [B,A*C,D] from `absorbed_values`, mask bool [B,C].
    Returns [B,S,D]; exactly x for a batch row whose concepts are all masked.
    """
    return torch.baddbmm(x, concept_weights(q, k, mask), values)  # [B,S,D]


def fully_absorbed_injection(
    x: Tensor,
    h: Tensor,
    keys: Tensor,
    offset: Tensor | None,
    values: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """x + W_O attention(W_Q h + b_Q, k, v), both projections folded; for an injector without query norm.

    x and h [B,S,D], keys [B,C,A,D] and offset [B,A,C] from `absorbed_keys`, values [B,A*C,D] from
    `absorbed_values`.
    """
    heads = keys.shape[2]
    queries = h[:, :, None].expand(-1, -1, heads, -1)  # [B,S,A,D], one row for all heads
    weights = concept_weights(queries, keys, mask, offset, (h.shape[-1] // heads) ** -0.5)  # [B,S,A*C]
    return torch.baddbmm(x, weights, values)  # [B,S,D]
