"""Wan2.1's video transformer with ConceptMaster's concept injection (arXiv 2501.04698).

Parts first, the model last. Module names are diffusers' (WanTransformer3DModel), so that its state dict
loads; what is new has names of its own: `injector` in every block (standalone), `add_k_proj`, `add_v_proj`
and `norm_added_k` in `attn2` (shared_query), `concept_proj` (merged). An image-to-video model of Wan's has
the same three as shared_query, but they are its own: its concept tokens are picture tokens (base).

Letters: B batch, K guidance branches (also a batch), N concepts, Q tokens per concept, C = N*Q, T text
tokens, F H W latent frames (f of patches), height, width, S video tokens, D width, A heads, E head width, Dc
concept width, Dt text width, Cg channels of the conditioned frames.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import wide
from ..kernels.cross_attention import (
    attention,
    concept_injection,
    decoupled_cross_attention,
    text_attention,
)
from ..kernels.modulate import residual_modulate
from ..kernels.qk_norm_rope import rotate
from .config import ModelConfig, TransformerConfig
from .embedders import ConditionEmbedder
from .frame_times import scaled, with_clean
from .layers import FeedForward, WideLayerNorm
from .positions import Positions

MIN_SIGMA = 0.05
"""Where the network predicts data, its distance to the latents is divided by at least this noise level."""

Conditions = dict[str, Tensor]
"""text_keys, text_values [layers,K,T,A,E]; concept_keys, concept_values [layers,K,C,A,E] unless the injection
is `merged` or `none`. text_bias [K,T], which the caller may add, where one key stands for all padding: see
`kernels.cross_attention.padding_bias`."""


class Attention(nn.Module):
    """Projections and query/key normalisation (RMS across all heads) of one attention; `to_out` has its bias.

    With `added_width` it carries keys and values for concept tokens of that width beside the text's
    (shared_query, base).
    """

    def __init__(self, width: int, heads: int, eps: float, added_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.RMSNorm(width, eps=eps)
        self.norm_k = nn.RMSNorm(width, eps=eps)
        if added_width is not None:
            self.add_k_proj = nn.Linear(added_width, width)
            self.add_v_proj = nn.Linear(added_width, width)
            self.norm_added_k = nn.RMSNorm(width, eps=eps)

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

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """x [B,S,D], keys and values [B,C,A,E], mask bool [B,C] or None -> what to add to x, [B,S,D]."""
        q = self.norm_q(self.to_q(self.norm(x).type_as(x))).unflatten(-1, (self.heads, -1))  # [B,S,A,E]
        return self.to_out(concept_injection(q, keys, values, mask).flatten(-2))  # [B,S,D]


class BlockConditions(NamedTuple):
    """Keys and values that one block attends to: text [K,T,A,E], concepts [K,C,A,E], or [R,C,A,E] where only
    the last R branches see any (standalone).

    Those of the concepts are None where the injection is `merged` or `none`. text_bias [K,T] (`merged`:
    [K,T+C], with the mask in it): None where every key counts once.
    """

    text_keys: Tensor
    text_values: Tensor
    concept_keys: Tensor | None
    concept_values: Tensor | None
    text_bias: Tensor | None = None


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

    def __init__(self, config: TransformerConfig, concept_width: int, injection: str) -> None:
        super().__init__()
        width, heads, eps = config.width, config.num_attention_heads, config.eps
        # a base's own has brought the tokens to the transformer's width before
        added = {"shared_query": concept_width, "base": config.added_kv_proj_dim}.get(injection)
        self.injection = injection
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.norm1 = WideLayerNorm(width, eps, elementwise_affine=False)
        self.attn1 = Attention(width, heads, eps)
        self.norm2 = WideLayerNorm(width, eps) if config.cross_attn_norm else nn.Identity()
        self.attn2 = Attention(width, heads, eps, added_width=added)
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
        out = self.attn1.output(attention(rotate(self.attn1.queries(h), *rotary), rotate(k, *rotary), v))
        x = (wide(x) + scaled(out, gate)).type_as(x)  # [K,S,D]

        q = self.attn2.queries(self.norm2(x).type_as(x))  # [K or 1,S,A,E]
        if len(q) < len(kv.text_keys):
            q = q.expand(len(kv.text_keys), -1, -1, -1)  # [K,S,A,E]
        x = x + self.attn2.output(self._cross_attention(q, kv, mask))  # [K,S,D]
        if self.injection == "standalone":
            assert kv.concept_keys is not None and kv.concept_values is not None
            x = self._inject(x, kv.concept_keys, kv.concept_values, mask)  # [K,S,D]

        h = scaled(self.norm3(x), 1 + ffn_scale, ffn_shift).type_as(x)
        return (wide(x) + scaled(wide(self.ffn(h)), ffn_gate)).type_as(x)  # [K,S,D]

    def _inject(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """x [K,S,D], keys and values [K or R,C,A,E], mask bool [K,C] -> x and the concepts, [K,S,D]."""
        if len(keys) == len(x):
            return x + self.injector(x, keys, values, mask)
        blind, seeing = x.split([len(x) - len(keys), len(keys)])  # the first would get exactly zero
        mask = None if mask is None else mask[-len(keys) :]  # [R,C]
        return torch.cat((blind, seeing + self.injector(seeing, keys, values, mask)))

    def _cross_attention(self, q: Tensor, kv: BlockConditions, mask: Tensor | None) -> Tensor:
        """[K,S,A,E] -> [K,S,A,E]: to the text, and to the concepts where these share the text's query."""
        if self.injection == "merged" and kv.text_bias is None:
            return attention(q, kv.text_keys, kv.text_values, mask)
        if self.injection in ("standalone", "none", "merged"):
            return text_attention(q, kv.text_keys, kv.text_values, kv.text_bias)
        assert kv.concept_keys is not None and kv.concept_values is not None
        concepts = kv.concept_keys, kv.concept_values
        return decoupled_cross_attention(
            q, kv.text_keys, kv.text_values, *concepts, mask, text_bias=kv.text_bias
        )


def _initialise(modules: dict[str, nn.Module]) -> None:
    """Xavier weights and zero biases; zero where the network must start silent. The names are the
    transformer's."""
    for module in modules.values():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in modules.items():
        if name == "proj_out" or name.endswith(("injector.to_out", "add_v_proj")):
            nn.init.zeros_(cast("nn.Linear", module).weight)


class ConceptDiT(nn.Module):
    """The transformer: `condition` once per request, `denoise` once per step; `forward`, to train, is both.

    Freshly built its last projection predicts exactly zero, as in Wan. What that projection tells is the
    velocity, as in Wan, or with `prediction="sample"` the data, from which the velocity follows: a narrow
    network need not carry the noise of wide latents through (Li and He, arXiv 2511.13720).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.transformer
        self.config = config
        self.positions = Positions(config)
        self.patch_embedding = nn.Conv3d(
            c.in_channels + c.position_channels, c.width, kernel_size=c.patch_size, stride=c.patch_size
        )
        self.condition_embedder = ConditionEmbedder(c)
        self.concept_proj: nn.Linear | None = None
        if config.concept.injection == "merged":
            self.concept_proj = nn.Linear(config.concept.width, c.width)
        self.blocks = nn.ModuleList(
            [Block(c, config.concept.width, config.concept.injection) for _ in range(c.num_layers)]
        )
        self.norm_out = WideLayerNorm(c.width, c.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(c.width, c.out_channels * math.prod(c.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, c.width) / c.width**0.5)
        _initialise(dict(self.named_modules()))

    def initialise_concepts(self) -> None:
        """New values on the CPU for all that a plain Wan2.1 transformer does not have: a silent injection.

        For a model that was built on the meta device, where nothing has values; the base is left alone.
        """
        new = {n: m for n, m in self.named_modules() if self._is_concept(f"{n}.") and m._parameters}
        for module in new.values():
            module.to_empty(device="cpu", recurse=False)
            cast("nn.Linear", module).reset_parameters()
        _initialise(new)

    def concept_keys(self) -> set[str]:
        """State-dict keys that a Wan2.1 transformer does not have; an image-to-video one has all."""
        return {key for key in self.state_dict() if self._is_concept(key)}

    def _is_concept(self, key: str) -> bool:
        new = ("injector.", "add_k_proj.", "add_v_proj.", "norm_added_k.", "concept_proj.")
        return self.config.concept.injection != "base" and any(part in key for part in new)

    def _token_mask(self, concept_mask: Tensor) -> Tensor:
        """bool [K,N] -> bool [K,C]."""
        q = self.config.concept.tokens_per_concept
        return concept_mask[:, :, None].expand(-1, -1, q).flatten(1).contiguous()  # of one it is a view

    def condition(self, text: Tensor, concept_tokens: Tensor, concept_mask: Tensor) -> Conditions:
        """Every block's cross-attention keys and values; they do not depend on time or latents.

        text [K,T,Dt] (zero where padded: Wan attends to all T tokens; or T fewer of them, and then a
        text_bias for `denoise`), concept_tokens [K,N,Q,Dc], or [N,Q,Dc]
        for the same concepts in every branch, concept_mask bool [K,N]. A masked concept's tokens are not
        read, not even when they are NaN. Keys come out normalised. For `base` the tokens are the picture
        encoder's, [K,N,P,Dp].
        """
        text = self.condition_embedder.text_embedder(text)  # [K,T,D]
        concepts = torch.where(concept_mask[:, :, None, None], concept_tokens, 0.0).flatten(1, 2)  # [K,C,Dc]
        if self.condition_embedder.image_embedder is not None:
            concepts = self.condition_embedder.image_embedder(concepts)  # [K,C,D]
        if self.concept_proj is not None:
            text = torch.cat((text, self.concept_proj(concepts)), dim=1)  # [K,T+C,D]
        blocks = [block.conditions(text, concepts) for block in cast("list[Block]", self.blocks)]
        return {
            name: torch.stack(parts)  # [layers,K,T|C,A,E]
            for name, parts in zip(KEYS_VALUES, zip(*blocks, strict=True), strict=False)
            if parts[0] is not None
        }

    def denoise(
        self,
        latents: Tensor,
        time: Tensor,
        kv: Conditions,
        concept_mask: Tensor | None,
        conditioning: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity (noise minus data) at these latents.

        latents [K,Cz,F,H,W] of any size that divides into patches, or [1,Cz,F,H,W] for all branches, whose
        first self-attention is then one; time [K] or [1] (sigma * 1000), kv from `condition`, perhaps with
        text_bias [K,T], concept_mask bool [K or R,N] as there (None: every concept is seen), conditioning
        [K or 1,Cg,F,H,W] (where pictures are frames): a mask of the frames that are pictures, then their
        latents; where they are `clean` of the first latent frame alone, [K or 1,Cg,1,H,W], and None for no
        picture. Returns [K,Cz,F,H,W].

        guidance [K], whose sum is one: latents and time are those of all branches, and what returns is
        sum over k of guidance_k velocity_k, [1,Cz,F,H,W]. What follows the last norm is linear, so it is
        done once.
        """
        known, frame_time = latents, time
        if conditioning is not None and self.config.concept.given == "clean":
            known, frame_time = with_clean(latents, time, conditioning)  # [K,Cz,F,H,W], [K,F]
        elif conditioning is not None:
            shared = conditioning.expand(latents.shape[0], -1, -1, -1, -1)  # [K,Cg,F,H,W]
            known = torch.cat((latents, shared), dim=1)  # [K,Cz+Cg,F,H,W]
        placed, rotary = self.positions(known)  # [K,Cz+Cg+p,F,H,W]
        patches = self.patch_embedding(placed)  # [K,D,f,h,w]
        grid, x = patches.shape[2:], patches.flatten(2).transpose(1, 2)  # x [K,S,D]

        embedding, modulation = self.condition_embedder.time(frame_time)  # [K,D], [K,6,D], or [K,F,…]
        mask = None if concept_mask is None else self._token_mask(concept_mask)  # [K,C]
        bias = kv.get("text_bias")  # [K,T]
        if self.config.concept.injection == "merged":
            keys = kv["text_keys"].shape[2]  # T+C
            if mask is None:
                bias = None if bias is None else F.pad(bias, (0, keys - bias.shape[1]))  # [K,T+C]
            else:
                if bias is not None:  # has the mask in it
                    concepts = torch.zeros_like(mask, dtype=bias.dtype).masked_fill(~mask, -math.inf)  # [K,C]
                    bias = torch.cat((bias, concepts), dim=1)  # [K,T+C]
                mask = torch.cat((mask.new_ones(mask.shape[0], keys - mask.shape[1]), mask), dim=1)  # [K,T+C]

        conditions = [kv[name].unbind(0) if name in kv else [None] * len(self.blocks) for name in KEYS_VALUES]
        for block, *parts in zip(self.blocks, *conditions, strict=True):
            own = BlockConditions(*parts)._replace(text_bias=bias)
            x = block(x, modulation, rotary, own, mask)  # [K,S,D]

        shift, scale = (self.scale_shift_table + embedding.unsqueeze(-2)).chunk(2, dim=-2)  # [K,1,D] each
        if isinstance(x, DeferredResidual):
            vectors = scale.squeeze(-2), shift.squeeze(-2)  # [K,D] each, or [K,F,D]
            _, last = residual_modulate(*x, *vectors, eps=self.norm_out.eps)  # [K,S,D]
        else:
            last = scaled(self.norm_out(x), 1 + scale, shift)  # [K,S,D]
        if guidance is not None:
            last = wide(last)
            last = (guidance.type_as(last)[None] @ last.flatten(1)).unflatten(1, last.shape[1:])  # [1,S,D]
        last = last.to(self.proj_out.weight.dtype)
        output = self._unpatch(self.proj_out(last), grid)  # [K or 1,Cz,F,H,W]
        if self.config.transformer.prediction == "velocity":
            return output
        sigma = (time / 1000.0).clamp(min=MIN_SIGMA)[:, None, None, None, None]  # [K,1,1,1,1]
        return ((wide(latents) - wide(output)) / sigma).type_as(latents)

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text: Tensor,
        concept_tokens: Tensor,
        concept_mask: Tensor,
        conditioning: Tensor | None = None,
    ) -> Tensor:
        """`condition`, then `denoise`, with their shapes."""
        kv = self.condition(text, concept_tokens, concept_mask)
        return self.denoise(latents, time, kv, concept_mask, conditioning)

    def _unpatch(self, x: Tensor, grid: torch.Size) -> Tensor:
        """[K,S,pf*ph*pw*Cz] -> [K,Cz,F,H,W], for a grid of f, h, w patches."""
        x = x.unflatten(1, grid).unflatten(-1, (*self.config.transformer.patch_size, -1))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [K,Cz,f,pf,h,ph,w,pw]
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # [K,Cz,F,H,W]
