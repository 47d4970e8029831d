"""Cross-attention from video tokens to text and to concepts: the plain-torch reference.

Letters: B batch, S video tokens, T text tokens, C concept tokens, A heads, E head width.

A masked key contributes exactly nothing: its softmax weight is an exact zero, so whatever (finite) content it
has, the result is the same bit for bit. A row without any key left gives exactly zero, never NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(E), over the keys that the mask allows.

    q [B,S,A,E], k and v [B,T,A,E], mask bool [B,T] (True: attend; None: every key). Returns [B,S,A,E] in q's
    dtype. A batch row whose mask is all False returns exactly zero.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B,A,S|T,E]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [B,S,A,E]
    some = mask.any(dim=-1, keepdim=True)  # [B,1]
    # A row with no key would be 0/0: let it attend to everything, then replace what came out.
    # ONNX Runtime's Attention wants a mask with an entry for every query.
    allowed = (mask | ~some)[:, None, None].expand(-1, -1, q.shape[2], -1)  # [B,1,S,T]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # [B,A,S,E]
    return torch.where(some[:, :, None, None], out, 0.0).transpose(1, 2)  # [B,S,A,E]


def concept_injection(
    q: Tensor, concept_k: Tensor, concept_v: Tensor, concept_mask: Tensor | None = None
) -> Tensor:
    """Attention of video queries to concept tokens: the core of ConceptMaster's injector (arXiv 2501.04698).

    q [B,S,A,E], concept_k and concept_v [B,C,A,E], concept_mask bool [B,C]. Returns [B,S,A,E]; exactly zero
    for a batch row whose concepts are all masked.
    """
    return attention(q, concept_k, concept_v, concept_mask)


def decoupled_cross_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    concept_k: Tensor,
    concept_v: Tensor,
    concept_mask: Tensor | None = None,
    concept_scale: float = 1.0,
) -> Tensor:
    """One query, two sets of keys, each with its own softmax; outputs summed (IP-Adapter, arXiv 2308.06721).

    q [B,S,A,E], text_k and text_v [B,T,A,E], concept_k and concept_v [B,C,A,E], concept_mask bool [B,C]
    (True: attend). Returns attention(text) + concept_scale * attention(concepts), [B,S,A,E]. Text is never
    masked, as in Wan.
    """
    text = attention(q, text_k, text_v)  # [B,S,A,E]
    concepts = attention(q, concept_k, concept_v, concept_mask)  # [B,S,A,E]
    return text + concepts if concept_scale == 1.0 else text + concept_scale * concepts  # [B,S,A,E]
