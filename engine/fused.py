"""The transformer as it is served: the same weights and the same sums, between products by fused kernels.

`fuse` puts a FusedBlock in the place of every block. A block's parts stay those of blocks.py; what stands
between them goes through `kernels/`, whose ops are Triton on CUDA and plain torch elsewhere. For inference
only: training and the exporter keep the plain blocks, so ONNX graphs do not know of this file.

Letters: K guidance branches, C concept tokens, T text tokens, S video tokens, D width, A heads, E head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
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
from ..kernels.fp8_attention import cudnn_attends, fp8_attention, qkv_to_fp8, query_key_steps
from ..kernels.fp8_linear import Fp8Linear, Quantised, why_no_fp8
from ..kernels.modulate import modulate, residual, residual_modulate
from ..kernels.qk_norm_rope import inverse_rms, qk_norm_rope
from ..kernels.self_attention import WAYS, self_attention, ways
from .blocks import Among, Attention, Block, BlockConditions, DeferredResidual, attention_among
from .dit import ConceptDiT
from .parts import Part
from .tiers import TIERS, EightBits, quantise

WIDE = ("time_embedder.", "scale_shift_table", "norm1.", "norm2.", "norm3.", "injector.norm.")
"""Parts of names that keep float32 in a model of fewer bits, as in diffusers' WanTransformer3DModel."""


@dataclass(frozen=True)
class Fusing:
    """How blocks are fused.

    tier: one of TIERS (tiers.py); all but "lossless" are lossy. eight: what is in 8 bits, in the place of the
    tier's own table. absorb: whether an injector's output projection is folded into its values once per
    request; None where that costs fewer multiplications. attention: how self-attention in 16 bits is computed
    on CUDA, one of WAYS in kernels/self_attention.py; None takes the fastest. Raises ValueError for another
    tier or way.
    """

    tier: str = "lossless"
    eight: EightBits | None = None
    absorb: bool | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise ValueError(f"unknown tier {self.tier!r}: choose one of {', '.join(TIERS)}")
        if self.attention not in (None, *WAYS):
            raise ValueError(f"unknown attention {self.attention!r}: choose one of {', '.join(WAYS)}")

    @property
    def bits(self) -> EightBits | None:
        """What is in 8 bits, None if nothing."""
        return self.eight or TIERS[self.tier]


class SelfAttention(nn.Module):
    """Attention among the video's tokens, with one product for queries, keys and values.

    The weights of `attn`'s three become parts of the one that is kept here: none of them is there twice. way:
    see `Fusing.attention`.
    """

    qk_steps: Tensor | None

    def __init__(self, attn: Attention, way: str | None) -> None:
        super().__init__()
        self.heads, self.way = attn.heads, way
        self.to_qkv = _joined(attn.to_q, attn.to_k, attn.to_v)
        self.norm_q, self.norm_k, self.to_out = attn.norm_q, attn.norm_k, attn.to_out
        self.register_buffer("qk_steps", None)  # there where attention is in fp8

    def attend_in_fp8(self) -> None:
        """From now on attention is in fp8, where it can be (kernels/fp8_attention.py)."""
        self.qk_steps = query_key_steps(self.norm_q.weight.detach(), self.norm_k.weight.detach())

    def forward(
        self,
        h: Tensor,
        rotary: tuple[Tensor, Tensor],
        among: Among | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """h [K,S,D], rotary two [S,1,E/2] -> [K,S,D]; see BlockConditions. Of a part attention is in 16 bits
        in every tier."""
        if part is None and among is not None and among.blind:
            blind, video = among.blind, among.video
            first, last = h[:blind, :video].contiguous(), h[blind:].contiguous()
            alone = self(first, (rotary[0][:video], rotary[1][:video]))  # [K-R,S,D]
            alone = F.pad(alone, (0, 0, 0, h.shape[1] - video))  # [K-R,S+P,D]
            return torch.cat((alone, self(last, rotary, among._replace(blind=0))))  # [K,S+P,D]
        q, k, v = self.to_qkv(h).chunk(3, dim=-1)  # [K,S,D] each
        shape = (*h.shape[:2], self.heads, h.shape[-1] // self.heads)
        mask = None if among is None else among.mask
        if self.qk_steps is not None and mask is None and part is None and cudnn_attends(h.device, shape):
            weights = self.norm_q.weight, self.norm_k.weight
            given = qkv_to_fp8(q, k, v, *weights, *rotary, self.qk_steps, _eps(self.norm_q))
            out8, scale = fp8_attention(*given)  # [K,S,A,E], [1]
            return self._output(Quantised(out8.flatten(-2), scale), h.dtype)
        q, k = qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, *rotary, eps=_eps(self.norm_q))
        v = v.unflatten(-1, (self.heads, -1))
        if part is not None:
            out = attention_among(q, k, v, among, part, self._attend)  # [K,S,A,E]
        else:
            out = self._attend(q, k, v) if mask is None else attention(q, k, v, mask)  # [K,S,A,E]
        return self.to_out[0](out.flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self_attention(q, k, v, self.way)

    def _output(self, out: Quantised, dtype: torch.dtype) -> Tensor:
        """[K,S,D] -> [K,S,D], by the last layer: in fp8 as it is, where that takes it so."""
        last = self.to_out[0]
        if isinstance(last, Fp8Linear):
            return last.product(out, dtype)
        return last((out.values.float() * out.scale).to(dtype))


class FusedBlock(nn.Module):
    """A Block with fused kernels between its products, and the same weights.

    Takes what Block does, with three differences: it gives a `DeferredResidual`; of the concepts it may take
    keys and values of those branches alone that see any; and where the injector is absorbed, its values
    [K,C,A,E] are [K,A*C,D].
    """

    def __init__(self, block: Block, absorb: bool, way: str | None = None) -> None:
        super().__init__()
        self.attn1 = SelfAttention(block.attn1, way)
        self.block = copy.copy(block)  # which others may go on using as it is
        outside = {"attn1", "proj_in", "proj_out"}  # the last two of a ControlBlock, for the transformer
        self.block.__dict__["_modules"] = {n: p for n, p in block._modules.items() if n not in outside}
        for name in ("proj_in", "proj_out"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))
        self.shares_query = hasattr(block.attn2, "add_k_proj")
        self.absorb = absorb

    def conditions(self, text: Tensor, concepts: Tensor) -> BlockConditions:
        """The block's keys and values, once per request, with whatever can be folded into them: the weight of
        the text queries' norm, and the injector's output projection.

        text [K,T,D], concepts [R,C,Dc].
        """
        kv, block = self.block.conditions(text, concepts), self.block
        weight = block.attn2.norm_q.weight.unflatten(0, (block.attn2.heads, -1))  # [A,E]
        kv = kv._replace(text_keys=kv.text_keys * weight)
        if self.shares_query and kv.concept_keys is not None:
            return kv._replace(concept_keys=kv.concept_keys * weight)
        if self.absorb:
            assert kv.concept_values is not None
            folded = absorbed_values(kv.concept_values, block.injector.to_out.weight)  # [R,A*C,D]
            return kv._replace(concept_values=folded)
        return kv

    def forward(
        self,
        x: Tensor | DeferredResidual,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv: BlockConditions,
        mask: Tensor | None,
    ) -> DeferredResidual:
        """As `Block.forward`, but for the last sum; x [K,S,D] or what another fused block gave.

        The concepts' keys and values may be of the last R of K branches alone, and mask [R,C]: the others
        see no concept, and nothing of the injector is computed for them.
        """
        block = self.block
        table = wide(block.scale_shift_table) + wide(modulation)  # [K,6,D], or of each frame, [K,f,6,D]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(-2)  # [K,D] or [K,f,D] each

        if isinstance(x, DeferredResidual):
            x, h = residual_modulate(*x, scale, shift, eps=block.norm1.eps)  # [K,S,D] each
        else:
            x = x.contiguous()  # patches come with their channels first
            h = modulate(x, scale, shift, eps=block.norm1.eps)  # [K,S,D]
        out = self.attn1(h, rotary, kv.among, kv.part)  # [K,S,D]

        to_out = block.attn2.to_out[0]
        later = to_out.bias if isinstance(to_out, nn.Linear) else None
        x, h = _affine(x, out, gate, block.norm2, later)  # [K or 1,S,D] each, and x is nobody else's
        if len(x) < len(kv.text_keys):  # the branches part here
            x, h = (part.expand(len(kv.text_keys), -1, -1).contiguous() for part in (x, h))  # [K,S,D] each
        parts = self._cross_attention(h, kv, mask)
        injected = kv.concept_keys if block.injection == "standalone" else None  # [R,C,A,E]
        seeing = 0 if injected is None else len(injected)
        if later is None and len(parts) == 1 and not seeing:  # one in 8 bits cannot add to x
            out = to_out(parts[0])  # [K,S,D]
            x, h = residual_modulate(x, out, None, ffn_scale, ffn_shift, eps=block.norm3.eps)  # [K,S,D] each
            return DeferredResidual(x, block.ffn(h), ffn_gate)
        for part, rows in zip(parts, x.split([len(part) for part in parts]), strict=True):
            _add_product(rows, part, to_out)
        if seeing:
            self._inject(x[-seeing:], kv, mask)
        h = modulate(x, ffn_scale, ffn_shift, eps=block.norm3.eps)  # [K,S,D]
        return DeferredResidual(x, block.ffn(h), ffn_gate)

    def _cross_attention(self, h: Tensor, kv: BlockConditions, mask: Tensor | None) -> list[Tensor]:
        """[K,S,D] -> [K,S,D]: to the text, and to the concepts where these share the text's query; in two
        parts, [K-R,S,D] and [R,S,D], where only some branches see any."""
        attn: Attention = self.block.attn2
        q, eps, heads = attn.to_q(h), _eps(attn.norm_q), (attn.heads, -1)  # [K,S,D]
        text = kv.text_keys, kv.text_values
        if not self.shares_query and kv.text_bias is None:
            # PyTorch's attention, the fastest where keys are many: it knows no norm
            q = F.rms_norm(q, q.shape[-1:], eps=eps).unflatten(-1, heads)  # [K,S,A,E]
            return [attention(q, *text, mask if self.block.injection == "merged" else None).flatten(-2)]
        rms, q = inverse_rms(q, eps), q.unflatten(-1, heads)  # [K,S], [K,S,A,E]
        if not self.shares_query:
            return [text_attention(q, *text, kv.text_bias, rms).flatten(-2)]
        assert kv.concept_keys is not None and kv.concept_values is not None
        alone, found = len(q) - len(kv.concept_keys), []
        first, last = slice(None, alone), slice(alone, None)  # branches without concepts, and with
        if alone:
            bias = None if kv.text_bias is None else kv.text_bias[first]
            found.append(text_attention(q[first], text[0][first], text[1][first], bias, rms[first]))
        if alone < len(q):
            bias = None if kv.text_bias is None else kv.text_bias[last]
            own, concepts = (text[0][last], text[1][last]), (kv.concept_keys, kv.concept_values)
            boxes = _of_last(kv.boxes, len(kv.concept_keys))
            found.append(decoupled_cross_attention(q[last], *own, *concepts, mask, rms[last], bias, boxes))
        return [part.flatten(-2) for part in found]

    def _inject(self, x: Tensor, kv: BlockConditions, mask: Tensor | None) -> None:
        """Adds to x [R,S,D], in place, what the injector brings from the concepts."""
        assert kv.concept_keys is not None and kv.concept_values is not None
        injector = self.block.injector
        h = modulate(x, *_vectors(injector.norm, x), plus_one=False, eps=injector.norm.eps)  # [R,S,D]
        q = injector.norm_q(injector.to_q(h)).unflatten(-1, (injector.heads, -1))  # [R,S,A,E]
        boxes = _of_last(kv.boxes, len(x))  # [R or 1,S,N]
        if self.absorb:
            absorbed_injection(x, q, kv.concept_keys, kv.concept_values, mask, boxes)
        else:
            out = concept_injection(q, kv.concept_keys, kv.concept_values, mask, boxes)  # [R,S,A,E]
            _add_product(x, out.flatten(-2), injector.to_out)


class TieredBlock(nn.Module):
    """A block in 16 bits and the same in 8, of which `compute_exactly` says which it is now."""

    def __init__(self, exact: FusedBlock, eight: nn.Module) -> None:
        super().__init__()
        self.exact, self.eight, self.exactly = exact, eight, False

    def conditions(self, text: Tensor, concepts: Tensor) -> BlockConditions:
        """As `FusedBlock.conditions`."""
        return self.exact.conditions(text, concepts)

    def forward(self, *arguments: Any) -> Any:
        """As `FusedBlock.forward`."""
        return self.exact(*arguments) if self.exactly else self.eight(*arguments)


def compute_exactly(transformer: nn.Module, exactly: bool) -> None:
    """Lets blocks that are there in both compute in 16 bits, or in 8, from now on."""
    for module in transformer.modules():
        if isinstance(module, TieredBlock):
            module.exactly = exactly


def fuse(transformer: ConceptDiT, fusing: Fusing = Fusing()) -> ConceptDiT:  # noqa: B008  (frozen)
    """Replaces every block of `transformer` by a FusedBlock, in place, and returns it. For inference only."""
    c, concept = transformer.config.transformer, transformer.config.concept
    absorb = concept.injection == "standalone" and concept.concept_tokens <= MAX_CONCEPT_TOKENS
    if fusing.absorb is None:
        absorb &= absorbing_wins(concept.concept_tokens, c.num_attention_heads, c.attention_head_dim)
    else:
        absorb &= fusing.absorb
    blocks, bits = cast("list[Block]", list(transformer.blocks)), fusing.bits
    for index, block in enumerate(blocks):
        fused: nn.Module = FusedBlock(block, absorb, fusing.attention)
        if bits is not None and bits.layer(index, len(blocks)):
            both = bits.first_steps or bits.last_steps
            exact = FusedBlock(block, absorb, fusing.attention) if both else None
            quantise(fused, bits, absorb)
            fused = fused if exact is None else TieredBlock(exact, fused)
        transformer.blocks[index] = fused
    if c.vace_layers is not None:  # whose hints are in 16 bits in every tier
        for index, block in enumerate(cast("list[Block]", list(transformer.vace_blocks))):
            transformer.vace_blocks[index] = FusedBlock(block, False, fusing.attention)
    return transformer


def why_not(fusing: Fusing, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why this device cannot compute as `fusing` says, one line; None where it can, as every CPU can."""
    if device.type != "cuda":
        return None
    if fusing.bits is not None:
        if dtype != torch.bfloat16:
            return (
                f"the tier {fusing.tier!r} is for bfloat16 on a GPU, not {str(dtype).removeprefix('torch.')}"
            )
        if (reason := why_no_fp8(device)) is not None:
            return f"the tier {fusing.tier!r} is not for this GPU: {reason}"
    there = ways(torch.empty((1, 1, 1, head_width), device=device, dtype=dtype))
    if fusing.attention not in (None, *there):
        return f"the attention {fusing.attention!r} is not there: choose one of {', '.join(there)}"
    return None


def narrow(transformer: ConceptDiT, dtype: torch.dtype) -> ConceptDiT:
    """Brings the weights to `dtype`, in place, but for those that are WIDE: they stay as they are.

    Before `fuse`, which in its tier `high` quantises what it finds.
    """
    for name, parameter in transformer.named_parameters():
        if not any(part in name for part in WIDE):
            parameter.data = parameter.data.to(dtype)
    return transformer


def _affine(
    x: Tensor, branch: Tensor, gate: Tensor | None, norm: nn.Module, later: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x + branch * gate + later, the affine LayerNorm of x + branch * gate), [K,S,D] each; where `norm` is
    no LayerNorm, twice the sum. later: [D]."""
    if not isinstance(norm, nn.LayerNorm):
        x = residual(x, branch, gate)  # [K,S,D]
        return (x if later is None else x + later), x
    scale, shift = _vectors(norm, x)
    return residual_modulate(x, branch, gate, scale, shift, later, plus_one=False, eps=norm.eps)


def _vectors(norm: nn.LayerNorm, x: Tensor) -> list[Tensor]:
    """Weight and bias of an affine norm as `modulate` takes them, [1,D] each."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [vector.to(dtype)[None] for vector in (norm.weight, norm.bias)]


def _add_product(x: Tensor, rows: Tensor, linear: nn.Module) -> None:
    """Adds what a linear layer makes of rows [K,S,D] to x [K,S,D], contiguous, in place; but for its bias,
    which is there already, unless the layer is one in 8 bits."""
    if isinstance(linear, nn.Linear):
        x.view(-1, x.shape[-1]).addmm_(rows.flatten(0, 1), linear.weight.t())
    else:
        x.add_(linear(rows))


def _of_last(boxes: Tensor | None, branches: int) -> Tensor | None:
    """Those of the last branches, [K or 1,S,N] -> [R or 1,S,N]."""
    return None if boxes is None else boxes[-branches:]


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
