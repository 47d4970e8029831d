"""The transformer's block: self-attention, text cross-attention, concept injection, feed-forward.

Module names are diffusers' (WanTransformer3DModel); what is new has names of its own, see dit.py.

Letters: K guidance branches (also a batch B), N concepts, Q tokens per concept, C = N*Q, T text tokens, F
latent frames (f of patches), S video tokens, D width, A heads, E head width, Dc concept width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.common import wide
from ..kernels.cross_attention import (
    attention,
    concept_injection,
    decoupled_cross_attention,
    text_attention,
)
from ..kernels.qk_norm_rope import rotate
from .frame_times import scaled
from .layers import FeedForward, WideLayerNorm
from .parts import Part
from .transformer_config import TransformerConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Self-attention in which all see all: each [K,S,A,E] -> [K,S,A,E]."""


class Attention(nn.Module):
    """Projections and query/key normalisation (RMS across all heads) of one attention; `to_out` has its bias.

    With `added_width` it carries keys and values for concept tokens of that width beside the text's
    (shared_query, base); added_bias: theirs have one.
    """

    def __init__(
        self, width: int, heads: int, eps: float, added_width: int | None = None, added_bias: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.RMSNorm(width, eps=eps)
        self.norm_k = nn.RMSNorm(width, eps=eps)
        if added_width is not None:
            self.add_k_proj = nn.Linear(added_width, width, bias=added_bias)
            self.add_v_proj = nn.Linear(added_width, width, bias=added_bias)
            self.norm_added_k = nn.RMSNorm(width, eps=eps)

    @torch.no_grad()
    def start_from_text(self, weight_of: Callable[[nn.Linear], Tensor]) -> None:
        """Gives the concepts the keys and values that text has now, but for their biases (IP-Adapter)."""
        for added, text in ((self.add_k_proj, self.to_k), (self.add_v_proj, self.to_v)):
            added.weight.copy_(weight_of(text))
        self.norm_added_k.weight.copy_(self.norm_k.weight)

    def queries(self, x: Tensor) -> Tensor:
        """[B,S,D] -> normalised queries [B,S,A,E]."""
        return self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B,T,D] -> normalised keys and values, each [B,T,A,E]."""
        heads = (self.heads, -1)
        return self.norm_k(self.to_k(x)).unflatten(-1, heads), self.to_v(x).unflatten(-1, heads)

    def added_keys_values(self, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """[B,C,Dc] -> normalised keys and values of the concept tokens, each [B,C,A,E]."""
        heads = (self.heads, -1)
        keys = self.norm_added_k(self.add_k_proj(concepts))
        return keys.unflatten(-1, heads), self.add_v_proj(concepts).unflatten(-1, heads)

    def output(self, x: Tensor) -> Tensor:
        """[B,S,A,E] -> [B,S,D]."""
        return self.to_out[0](x.flatten(-2))


class Injector(nn.Module):
    """ConceptMaster's MC-Injector: one more, standalone cross-attention, from video tokens to concept tokens.

    Its output projection starts at zero and has no bias: untrained, or with every concept masked, it adds
    exactly zero.
    """

    def __init__(self, width: int, heads: int, eps: float, concept_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = WideLayerNorm(width, eps)
        self.to_q = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width, eps=eps)
        self.to_k = nn.Linear(concept_width, width)
        self.to_v = nn.Linear(concept_width, width)
        self.norm_k = nn.RMSNorm(width, eps=eps)
        self.to_out = nn.Linear(width, width, bias=False)

    def keys_values(self, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """[B,C,Dc] -> normalised keys and values, each [B,C,A,E]."""
        heads = (self.heads, -1)
        return self.norm_k(self.to_k(concepts)).unflatten(-1, heads), self.to_v(concepts).unflatten(-1, heads)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """x [B,S,D], keys and values [B,C,A,E], mask bool [B,C] or None, boxes bool [B or 1,S,N] or None ->
        what to add to x, [B,S,D]."""
        q = self.norm_q(self.to_q(self.norm(x).type_as(x))).unflatten(-1, (self.heads, -1))  # [B,S,A,E]
        return self.to_out(concept_injection(q, keys, values, mask, boxes).flatten(-2))  # [B,S,D]


class Among(NamedTuple):
    """Who sees whom in self-attention, where some tokens are pictures' (grids.py): the first `blind` of the
    branches see the `video` first tokens alone; mask: bool [R,S+P] which the others see, None for all."""

    video: int
    blind: int
    mask: Tensor | None = None


def attention_among(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    among: Among | None,
    part: Part | None = None,
    attend: Attend = attention,
) -> Tensor:
    """Self-attention, each [K,S,A,E] -> [K,S,A,E]; zero for a blind branch's tokens that are not video. part:
    whose tokens these are, None where all are there; attend: without a mask."""
    if part is not None:
        q, k, v = part.by_heads(q, k, v)  # [K,S,A/u,E] each
        return part.by_tokens(attention_among(q, k, v, among, None, attend))
    if among is None:
        return attend(q, k, v)
    blind, video = among.blind, among.video
    last = q[blind:], k[blind:], v[blind:]
    seeing = attend(*last) if among.mask is None else attention(*last, among.mask)  # [R,S+P,A,E]
    if not blind:
        return seeing
    alone = attend(q[:blind, :video], k[:blind, :video], v[:blind, :video])  # [K-R,S,A,E]
    alone = torch.cat((alone, torch.zeros_like(q[:blind, video:])), dim=1)  # [K-R,S+P,A,E]
    return torch.cat((alone, seeing))  # [K,S+P,A,E]


class BlockConditions(NamedTuple):
    """Keys and values that one block attends to: text [K,T,A,E], concepts [K,C,A,E], or [R,C,A,E] where only
    the last R branches see any (standalone).

    Those of the concepts are None where the injection is `merged` or `none`. text_bias [K,T] (`merged`:
    [K,T+C], with the mask in it): None where every key counts once. among: of self-attention, None where all
    see all; part: whose of the tokens are here, None where all are. boxes bool [K or 1,S,N]: which
    concept a token may see, None where all may see all.
    """

    text_keys: Tensor
    text_values: Tensor
    concept_keys: Tensor | None
    concept_values: Tensor | None
    text_bias: Tensor | None = None
    among: Among | None = None
    part: Part | None = None
    boxes: Tensor | None = None


KEYS_VALUES = BlockConditions._fields[:4]
"""What `ConceptDiT.condition` gives, by name."""


class DeferredResidual(NamedTuple):
    """What a fused block gives: x + branch * gate, not yet added up, which the first kernel behind it does.
    [K,S,D], [K,S,D], [K,D] or [K,f,D]."""

    x: Tensor
    branch: Tensor
    gate: Tensor


class Block(nn.Module):
    """Self-attention, text cross-attention, concept injection, feed-forward."""

    def __init__(
        self, config: TransformerConfig, concept_width: int, injection: str, keys: str = "own"
    ) -> None:
        super().__init__()
        width, heads, eps = config.width, config.num_attention_heads, config.eps
        # a base's own has brought the tokens to the transformer's width before
        added = {"shared_query": concept_width, "base": config.added_kv_proj_dim}.get(injection)
        self.injection = injection
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.norm1 = WideLayerNorm(width, eps, elementwise_affine=False)
        self.attn1 = Attention(width, heads, eps)
        self.norm2 = WideLayerNorm(width, eps) if config.cross_attn_norm else nn.Identity()
        self.attn2 = Attention(width, heads, eps, added, added_bias=keys == "own")
        self.norm3 = WideLayerNorm(width, eps, elementwise_affine=False)
        self.ffn = FeedForward(width, config.ffn_dim, width)
        if injection == "standalone":
            self.injector = Injector(width, heads, eps, concept_width)

    def conditions(self, text: Tensor, concepts: Tensor) -> BlockConditions:
        """This block's keys and values.

        text [K,T,D] (when `merged`: with the projected concept tokens behind it), concepts [K,C,Dc] (when
        `base`: [K,C,D]).
        """
        if self.injection == "standalone":
            return BlockConditions(*self.attn2.keys_values(text), *self.injector.keys_values(concepts))
        if self.injection in ("shared_query", "base"):
            return BlockConditions(*self.attn2.keys_values(text), *self.attn2.added_keys_values(concepts))
        return BlockConditions(*self.attn2.keys_values(text), None, None)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv: BlockConditions,
        mask: Tensor | None,
    ) -> Tensor:
        """x [K,S,D], modulation [K or 1,6,D] (or of each latent frame, [K or 1,f,6,D]), rotary two [S,1,E/2],
        mask bool [K,C] (merged: T+C) or None for all True -> x.

        x may be [1,S,D], as long as the branches differ in nothing: their text and concepts part them.
        """
        table = wide(self.scale_shift_table) + wide(modulation)  # [K,6,D], or [K,f,6,D]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.chunk(6, dim=-2)  # [K,1,D] or [K,f,1,D]

        h = scaled(self.norm1(x), 1 + scale, shift).type_as(x)
        k, v = self.attn1.keys_values(h)
        q, k = rotate(self.attn1.queries(h), *rotary), rotate(k, *rotary)
        out = self.attn1.output(attention_among(q, k, v, kv.among, kv.part))
        x = (wide(x) + scaled(out, gate)).type_as(x)  # [K,S,D]

        q = self.attn2.queries(self.norm2(x).type_as(x))  # [K or 1,S,A,E]
        if len(q) < len(kv.text_keys):
            q = q.expand(len(kv.text_keys), -1, -1, -1)  # [K,S,A,E]
        x = x + self.attn2.output(self._cross_attention(q, kv, mask))  # [K,S,D]
        if self.injection == "standalone":
            assert kv.concept_keys is not None and kv.concept_values is not None
            x = self._inject(x, kv.concept_keys, kv.concept_values, mask, kv.boxes)  # [K,S,D]

        h = scaled(self.norm3(x), 1 + ffn_scale, ffn_shift).type_as(x)
        return (wide(x) + scaled(wide(self.ffn(h)), ffn_gate)).type_as(x)  # [K,S,D]

    def _inject(
        self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, boxes: Tensor | None
    ) -> Tensor:
        """x [K,S,D], keys and values [K or R,C,A,E], mask bool [K,C], boxes bool [K or 1,S,N] -> x and the
        concepts, [K,S,D]."""
        if len(keys) == len(x):
            return x + self.injector(x, keys, values, mask, boxes)
        blind, seeing = x.split([len(x) - len(keys), len(keys)])  # the first would get exactly zero
        mask = None if mask is None else mask[-len(keys) :]  # [R,C]
        boxes = None if boxes is None else boxes[-len(keys) :]  # [R or 1,S,N]
        return torch.cat((blind, seeing + self.injector(seeing, keys, values, mask, boxes)))

    def _cross_attention(self, q: Tensor, kv: BlockConditions, mask: Tensor | None) -> Tensor:
        """[K,S,A,E] -> [K,S,A,E]: to the text, and to the concepts where these share the text's query."""
        if self.injection == "merged" and kv.text_bias is None:
            return attention(q, kv.text_keys, kv.text_values, mask)
        if self.injection in ("standalone", "none", "merged"):
            return text_attention(q, kv.text_keys, kv.text_values, kv.text_bias)
        assert kv.concept_keys is not None and kv.concept_values is not None
        concepts = kv.concept_keys, kv.concept_values
        return decoupled_cross_attention(
            q, kv.text_keys, kv.text_values, *concepts, mask, text_bias=kv.text_bias, boxes=kv.boxes
        )


class ControlBlock(Block):
    """One of VACE's own blocks beside the transformer's: the control's tokens go through it, and their
    `proj_out` is the hint that is added to the video's, behind one of the transformer's blocks.

    Before the first the control gets its `proj_in` and the video's tokens, as they come out of the patch
    embedding (diffusers' WanVACETransformer3DModel). Hints need nothing of the transformer's blocks, so that
    computing each where it is added is the same as computing all beforehand.
    """

    def __init__(self, config: TransformerConfig, first: bool) -> None:
        super().__init__(config, concept_width=0, injection="none")
        if first:
            self.proj_in = nn.Linear(config.width, config.width)
        self.proj_out = nn.Linear(config.width, config.width)
