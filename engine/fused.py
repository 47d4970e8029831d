"""The transformer as it is served: the same weights and the same sums, between products by fused kernels.

`fuse` puts a FusedBlock in the place of every block. A block's parts stay those of dit.py; what stands
between them goes through `kernels/`, whose ops are Triton on CUDA and plain torch elsewhere. For inference
only: training and the exporter keep the plain blocks, so ONNX graphs do not know of this file.

Letters: K guidance branches, C concept tokens, T text tokens, S video tokens, D width, A heads, E head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..kernels.absorbed_injection import (
    MAX_CONCEPT_TOKENS,
    absorbed_injection,
    absorbed_values,
    absorbing_wins,
)
from ..kernels.common import wide
from ..kernels.cross_attention import (
    attention,
    concept_injection,
    decoupled_cross_attention,
    text_attention,
)
from ..kernels.fp8_linear import Fp8Linear
from ..kernels.modulate import modulate, residual_modulate, residual_reference
from ..kernels.qk_norm_rope import inverse_rms, qk_norm_rope
from ..kernels.self_attention import WAYS, self_attention
from .dit import Attention, Block, BlockConditions, ConceptDiT

TIERS = ("lossless", "high")
WIDE = ("time_embedder.", "scale_shift_table", "norm1.", "norm2.", "norm3.", "injector.norm.")
"""Parts of names that keep float32 in a model of fewer bits, as in diffusers' WanTransformer3DModel."""


@dataclass(frozen=True)
class Fusing:
    """How blocks are fused.

    tier: one of TIERS; "high" is linear layers in fp8 (lossy; their error is RELATIVE_L2 in
    kernels/tolerances.py). absorb: whether an injector's output projection is folded into its values once per
    request; None where that costs fewer multiplications. attention: how self-attention in 16 bits is computed
    on CUDA, one of WAYS in kernels/self_attention.py; None takes the fastest. Raises ValueError for another
    tier or way.
    """

    tier: str = "lossless"
    absorb: bool | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise ValueError(f"unknown tier {self.tier!r}: choose one of {', '.join(TIERS)}")
        if self.attention not in (None, *WAYS):
            raise ValueError(f"unknown attention {self.attention!r}: choose one of {', '.join(WAYS)}")


class DeferredResidual(NamedTuple):
    """x + branch * gate, not yet added up: the next block's first kernel does it. [K,S,D], [K,S,D], [K,D]."""

    x: Tensor
    branch: Tensor
    gate: Tensor


class SelfAttention(nn.Module):
    """Attention among the video's tokens, with one product for queries, keys and values.

    The weights of `attn`'s three become parts of the one that is kept here: none of them is there twice. way:
    see `Fusing.attention`.
    """

    def __init__(self, attn: Attention, way: str | None) -> None:
        super().__init__()
        self.heads, self.way = attn.heads, way
        self.to_qkv = _joined(attn.to_q, attn.to_k, attn.to_v)
        self.norm_q, self.norm_k, self.to_out = attn.norm_q, attn.norm_k, attn.to_out

    def forward(self, h: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """h [K,S,D], rotary two [S,1,E/2] -> [K,S,D]."""
        q, k, v = self.to_qkv(h).chunk(3, dim=-1)  # [K,S,D] each
        q, k = qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, *rotary, eps=_eps(self.norm_q))
        out = self_attention(q, k, v.unflatten(-1, (self.heads, -1)), self.way)  # [K,S,A,E]
        return self.to_out[0](out.flatten(-2))


class FusedBlock(nn.Module):
    """A Block with fused kernels between its products, and the same weights.

    Takes and gives what Block does, with two differences that only fused blocks see: where the injector is
    absorbed, its values [K,C,A,E] are [K,A*C,D]; and between blocks x is a `DeferredResidual`.
    """

    def __init__(self, block: Block, last: bool, absorb: bool, way: str | None = None) -> None:
        super().__init__()
        self.attn1 = SelfAttention(block.attn1, way)
        self.block = copy.copy(block)  # which others may go on using as it is
        self.block.__dict__["_modules"] = {n: part for n, part in block._modules.items() if n != "attn1"}
        self.shares_query = hasattr(block.attn2, "add_k_proj")
        self.last = last
        self.absorb = absorb

    def conditions(self, text: Tensor, concepts: Tensor) -> BlockConditions:
        """The block's keys and values, once per request, with whatever can be folded into them.

        text [K,T,D], concepts [K,C,Dc].
        """
        kv, block = self.block.conditions(text, concepts), self.block
        if self.absorb:
            assert kv.concept_values is not None
            folded = absorbed_values(kv.concept_values, block.injector.to_out.weight)  # [K,A*C,D]
            return kv._replace(concept_values=folded)
        if self.shares_query and kv.concept_keys is not None:
            weight = block.attn2.norm_q.weight.unflatten(0, (block.attn2.heads, -1))  # [A,E]
            return kv._replace(text_keys=kv.text_keys * weight, concept_keys=kv.concept_keys * weight)
        return kv

    def forward(
        self,
        x: Tensor | DeferredResidual,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv: BlockConditions,
        mask: Tensor,
    ) -> Tensor | DeferredResidual:
        """As `Block.forward`; x [K,S,D] or, behind another fused block, DeferredResidual."""
        block = self.block
        table = wide(block.scale_shift_table) + wide(modulation)  # [K,6,D]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(1)  # [K,D] each

        if isinstance(x, DeferredResidual):
            x, h = residual_modulate(*x, scale, shift, eps=block.norm1.eps)  # [K,S,D] each
        else:
            x = x.contiguous()  # patches come with their channels first
            h = modulate(x, scale, shift, eps=block.norm1.eps)  # [K,S,D]
        out = self.attn1(h, rotary)  # [K,S,D]

        x, h = _affine(x, out, gate, block.norm2)  # [K or 1,S,D] each
        if len(x) < len(kv.text_keys):  # the branches part here
            x, h = (part.expand(len(kv.text_keys), -1, -1).contiguous() for part in (x, h))  # [K,S,D] each
        out = block.attn2.output(self._cross_attention(h, kv, mask))  # [K,S,D]

        if block.injection == "standalone":
            assert kv.concept_keys is not None and kv.concept_values is not None
            injector = block.injector
            x, h = _affine(x, out, None, injector.norm)  # [K,S,D] each
            q = injector.norm_q(injector.to_q(h)).unflatten(-1, (injector.heads, -1))  # [K,S,A,E]
            if self.absorb:
                x = absorbed_injection(x, q, kv.concept_keys, kv.concept_values, mask)  # [K,S,D]
                h = modulate(x, ffn_scale, ffn_shift, eps=block.norm3.eps)  # [K,S,D]
                return self._feed_forward(x, h, ffn_gate)
            out = injector.to_out(concept_injection(q, kv.concept_keys, kv.concept_values, mask).flatten(-2))
        x, h = residual_modulate(x, out, None, ffn_scale, ffn_shift, eps=block.norm3.eps)  # [K,S,D] each
        return self._feed_forward(x, h, ffn_gate)

    def _cross_attention(self, h: Tensor, kv: BlockConditions, mask: Tensor) -> Tensor:
        """[K,S,D] -> [K,S,A,E]: to the text, and to the concepts where these share the text's query."""
        attn: Attention = self.block.attn2
        if not self.shares_query or kv.concept_keys is None or kv.concept_values is None:
            q = attn.queries(h)  # [K,S,A,E]
            if self.block.injection == "merged" and kv.text_bias is None:
                return attention(q, kv.text_keys, kv.text_values, mask)
            return text_attention(q, kv.text_keys, kv.text_values, kv.text_bias)
        q = attn.to_q(h)  # [K,S,D]
        rms = inverse_rms(q, _eps(attn.norm_q))  # [K,S]
        heads = q.unflatten(-1, (attn.heads, -1))  # [K,S,A,E]
        return decoupled_cross_attention(
            heads, kv.text_keys, kv.text_values, kv.concept_keys, kv.concept_values, mask, rms, kv.text_bias
        )

    def _feed_forward(self, x: Tensor, h: Tensor, gate: Tensor) -> Tensor | DeferredResidual:
        branch = self.block.ffn(h)  # [K,S,D]
        return residual_reference(x, branch, gate) if self.last else DeferredResidual(x, branch, gate)


def fuse(transformer: ConceptDiT, fusing: Fusing = Fusing()) -> ConceptDiT:  # noqa: B008  (frozen)
    """Replaces every block of `transformer` by a FusedBlock, in place, and returns it. For inference only."""
    c, concept = transformer.config.transformer, transformer.config.concept
    absorb = concept.injection == "standalone" and concept.concept_tokens <= MAX_CONCEPT_TOKENS
    if fusing.absorb is None:
        absorb &= absorbing_wins(concept.concept_tokens, c.num_attention_heads, c.attention_head_dim)
    else:
        absorb &= fusing.absorb
    blocks = cast("list[Block]", list(transformer.blocks))
    transformer.blocks = nn.ModuleList(
        [FusedBlock(b, b is blocks[-1], absorb, fusing.attention) for b in blocks]
    )
    if fusing.tier == "high":
        for fused in transformer.blocks:
            _quantise(fused, absorb)
    return transformer


def narrow(transformer: ConceptDiT, dtype: torch.dtype) -> ConceptDiT:
    """Brings the weights to `dtype`, in place, but for those that are WIDE: they stay as they are.

    Before `fuse`, which in its tier `high` quantises what it finds.
    """
    for name, parameter in transformer.named_parameters():
        if not any(part in name for part in WIDE):
            parameter.data = parameter.data.to(dtype)
    return transformer


def _affine(x: Tensor, branch: Tensor, gate: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(x + branch * gate, its affine LayerNorm), [K,S,D] each; twice the sum where `norm` is no LayerNorm."""
    if not isinstance(norm, nn.LayerNorm):
        x = residual_reference(x, branch, gate)  # [K,S,D]
        return x, x
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (vector.to(dtype)[None] for vector in (norm.weight, norm.bias))  # [1,D] each
    return residual_modulate(x, branch, gate, weight, bias, plus_one=False, eps=norm.eps)


def _joined(*linears: nn.Linear) -> nn.Linear:
    """One layer whose outputs are those of `linears`, side by side; their own weights become parts of its."""
    first = linears[0]
    rows = [linear.out_features for linear in linears]
    found = nn.Linear(first.in_features, sum(rows), device="meta")
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        whole = torch.cat([part.detach() for part in parts])  # [sum of rows, ...]
        setattr(found, name, nn.Parameter(whole, requires_grad=False))
        for part, view in zip(parts, whole.split(rows), strict=True):
            part.data = view
    return found


def _eps(norm: nn.RMSNorm) -> float:
    assert norm.eps is not None
    return norm.eps


def _quantise(module: nn.Module, absorb: bool) -> None:
    """Linear layers of a block in fp8, where a GPU can: both widths divide by 16.

    What runs once per request stays as it is: what makes keys and values, and what is folded into them.
    """
    once: tuple[str, ...] = (
        "attn2.to_k",
        "attn2.to_v",
        "add_k_proj",
        "add_v_proj",
        "injector.to_k",
        "injector.to_v",
    )
    once += ("injector.to_out",) if absorb else ()
    found = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
        and not name.endswith(once)
        and not (child.in_features % 16 or child.out_features % 16)
    }
    for name, child in found.items():
        parent, _, own = name.rpartition(".")
        owner = module.get_submodule(parent)
        if isinstance(owner, (nn.ModuleList, nn.Sequential)):
            owner[int(own)] = Fp8Linear(child)
        else:
            setattr(owner, own, Fp8Linear(child))
