"""Cross-attention from video tokens to text and to concepts: reference and torch ops.

Letters: B batch, S video tokens, T text tokens, C concept tokens, A heads, E head width.

A masked key contributes exactly nothing: its softmax weight is an exact zero, so whatever (finite) content it
has, the result is the same bit for bit. A row without any key left gives exactly zero, never NaN.

A key may stand for several equal ones: with log(m) added to its logit it counts m times. So padding, whose
tokens are all the same, is one key (`padding_bias`), and the keys behind it, at minus infinity, none.

A query's RMS norm runs over all heads, but a program sees one head. What is left of the norm inside the
kernel is one number per token: the norm's weight belongs to the keys (fold it into them once per request),
and 1/rms scales a row of logits. So the normalised queries need never be written: `inverse_rms` reads them
once, and the kernel takes its [B,S] numbers.

On CUDA cross_attention_choice.py takes one of two kernels: that of Hopper, or the plain one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import beyond_a_word, by_query, check_boxes
from .common import TorchOp
from .cross_attention_choice import cross_attention_cuda
from .cross_attention_plain import MAX_WIDTH

# Reference.


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(E), over the keys that mask and boxes allow.

    q [B,S,A,E], k and v [B,T,A,E], mask bool [B,T] (True: attend; None: every key), bias float32 [B,T]
    (float64 of float64): added to the logits of every query and head; minus infinity takes a key away, but
    not a row's last one. boxes bool [B or 1,S,N], see boxes.py, go without a bias. Returns [B,S,A,E] in q's
    dtype. A batch row whose mask is all False returns zero, and so does a query that boxes leave no key.
    """
    if boxes is not None:
        assert bias is None
        return _boxed_attention(q, k, v, mask, boxes)
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


def _boxed_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, boxes: Tensor) -> Tensor:
    allowed = by_query(boxes, mask, k.shape[1])  # [B or 1,S,C]
    some = allowed.any(dim=-1, keepdim=True)  # [B or 1,S,1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B,A,S|C,E]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=(allowed | ~some)[:, None])  # [B,A,S,E]
    return torch.where(some[:, None], out, 0.0).transpose(1, 2)  # [B,S,A,E]


def _normalised(q: Tensor, inverse_rms: Tensor | None) -> Tensor:
    """Queries times their [B,S] numbers, in their dtype."""
    return q if inverse_rms is None else (q * inverse_rms[:, :, None, None]).type_as(q)  # [B,S,A,E]


def decoupled_cross_attention_reference(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    concept_k: Tensor,
    concept_v: Tensor,
    concept_mask: Tensor | None = None,
    inverse_rms: Tensor | None = None,
    text_bias: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Tensor:
    """`decoupled_cross_attention` in plain torch; for what inverse_rms and text_bias are, see there."""
    q = _normalised(q, inverse_rms)  # [B,S,A,E]
    text = attention(q, text_k, text_v, bias=text_bias)  # [B,S,A,E]
    return text + attention(q, concept_k, concept_v, concept_mask, boxes=boxes)  # [B,S,A,E]


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


# The torch op.


def _alike(q: Tensor, *others: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)  # [B,S,A,E]


def _decoupled_cuda(
    q: Tensor, tk: Tensor, tv: Tensor, ck: Tensor, cv: Tensor, *rest: Tensor | None
) -> Tensor:
    if beyond_a_word(rest[-1]):
        return decoupled_cross_attention_reference(q, tk, tv, ck, cv, *rest).contiguous()
    return cross_attention_cuda(q, (tk, tv), (ck, cv), *rest)


def _injection_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, boxes: Tensor | None) -> Tensor:
    if beyond_a_word(boxes):
        return attention(q, k, v, mask, None, boxes).contiguous()
    return cross_attention_cuda(q, None, (k, v), mask, boxes=boxes)


_decoupled = TorchOp(
    "decoupled_cross_attention",
    "q BSAE, text_k BTAE, text_v BTAE, concept_k BCAE, concept_v BCAE, concept_mask? bool BC, "
    "inverse_rms? wide BS, text_bias? wide BT, boxes? bool bSN",
    reference=decoupled_cross_attention_reference,
    cuda=_decoupled_cuda,
    empty=_alike,
    further=lambda q, tk, tv, k, *rest: check_boxes("decoupled_cross_attention", k, rest[-1]),
    limits={"E": MAX_WIDTH},
    one_node=True,
)
_injection = TorchOp(
    "concept_injection",
    "q BSAE, concept_k BCAE, concept_v BCAE, concept_mask? bool BC, boxes? bool bSN",
    reference=lambda q, k, v, mask, boxes: attention(q, k, v, mask, None, boxes),
    cuda=_injection_cuda,
    empty=_alike,
    further=lambda q, k, *rest: check_boxes("concept_injection", k, rest[-1]),
    limits={"E": MAX_WIDTH},
    one_node=True,
)
_biased = TorchOp(
    "biased_attention",
    "q BSAE, k BTAE, v BTAE, bias wide BT, inverse_rms? wide BS",
    reference=lambda q, k, v, bias, rms: attention(_normalised(q, rms), k, v, bias=bias),
    cuda=lambda q, k, v, bias, rms: cross_attention_cuda(q, (k, v), None, None, rms, bias),
    empty=_alike,
    limits={"E": MAX_WIDTH},
)


def text_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, inverse_rms: Tensor | None = None
) -> Tensor:
    """`attention` without a mask. With a bias it is the Triton kernel on CUDA, which adds it in float32.

    inverse_rms: as for `decoupled_cross_attention`; without a bias, queries are scaled by it beforehand.
    """
    if bias is None:
        return attention(_normalised(q, inverse_rms), k, v)
    return _biased(q, k, v, bias, inverse_rms)


def concept_injection(
    q: Tensor,
    concept_k: Tensor,
    concept_v: Tensor,
    concept_mask: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Tensor:
    """Attention of video queries to concept tokens: the core of ConceptMaster's injector (arXiv 2501.04698).

    q [B,S,A,E], concept_k and concept_v [B,C,A,E], concept_mask bool [B,C], boxes bool [B or 1,S,N], see
    boxes.py. Returns [B,S,A,E]; exactly zero for a batch row whose concepts are all masked, and for a query
    outside of all boxes. Raises ValueError for other shapes, mixed dtypes or devices, or a last axis that is
    not contiguous.
    """
    return _injection(q, concept_k, concept_v, concept_mask, boxes)


def decoupled_cross_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    concept_k: Tensor,
    concept_v: Tensor,
    concept_mask: Tensor | None = None,
    inverse_rms: Tensor | None = None,
    text_bias: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Tensor:
    """One query, two sets of keys, each with its own softmax; outputs summed (IP-Adapter, arXiv 2308.06721).

    q [B,S,A,E], text_k and text_v [B,T,A,E], concept_k and concept_v [B,C,A,E], concept_mask bool [B,C]
    (True: attend). Returns attention(text) + attention(concepts), [B,S,A,E]; a weight of the concepts belongs
    into their values. Text is never masked, as in Wan.

    inverse_rms, for queries that are not normalised yet: their `qk_norm_rope.inverse_rms`, float32 [B,S]
    (float64 of float64). The norm's weight must be in the keys already: k * weight.

    text_bias, for text whose padding is one key: float32 [B,T] (float64 of float64), see `attention` and
    `padding_bias`. boxes: of the concepts, bool [B or 1,S,N], see boxes.py.
    Raises ValueError as `concept_injection`.
    """
    return _decoupled(q, text_k, text_v, concept_k, concept_v, concept_mask, inverse_rms, text_bias, boxes)
