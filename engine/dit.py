"""Wan2.1's video transformer with ConceptMaster's concept injection (arXiv 2501.04698).

Its blocks are in blocks.py. Module names are diffusers' (WanTransformer3DModel, WanVACETransformer3DModel),
so that their state dicts load; what is new has names of its own: `injector` in every block (standalone),
`add_k_proj`, `add_v_proj` and `norm_added_k` in `attn2` (shared_query), `concept_proj` (merged). An
image-to-video model of Wan's has the same three as shared_query, but they are its own: its concept tokens are
picture tokens (base).

Letters: B batch, K guidance branches (also a batch), N concepts, Q tokens per concept, C = N*Q, T text
tokens, F H W latent frames (f of patches), height, width, S video tokens, D width, A heads, E head width, Dc
concept width, Dt text width, Cg channels of the conditioned frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import wide
from ..kernels.modulate import residual, residual_modulate
from .blocks import KEYS_VALUES, Block, BlockConditions, ControlBlock, DeferredResidual
from .config import ModelConfig
from .embedders import ConditionEmbedder
from .frame_times import scaled, with_clean
from .layers import WideLayerNorm
from .parts import Part
from .positions import Positions
from .references import AS_TOKENS, with_grids, with_pictures
from .shares import Share

MIN_SIGMA = 0.05
"""Where the network predicts data, its distance to the latents is divided by at least this noise level."""

Conditions = dict[str, Tensor]
"""text_keys, text_values [layers,K,T,A,E], VACE's own blocks behind the others; concept_keys, concept_values
[layers,K,C,A,E] unless the injection is `merged` or `none`. text_bias [K,T], which the caller may add, where
one key stands for all padding: see `kernels.cross_attention.padding_bias`; and of the mask `boxes` the
request's, see `ConceptDiT.denoise`."""


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


def _own_weight(layer: nn.Linear) -> Tensor:
    return layer.weight


def _summed(x: Tensor | DeferredResidual) -> Tensor:
    """What a block gives, [K,S,D]."""
    return residual(*x) if isinstance(x, DeferredResidual) else x


def _with_hint(x: Tensor | DeferredResidual, hint: Tensor) -> Tensor | DeferredResidual:
    """What a block gives and a hint [K,S,D], in one."""
    return x._replace(x=x.x + hint) if isinstance(x, DeferredResidual) else x + hint


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
            [
                Block(c, config.concept.width, config.concept.injection, config.concept.keys)
                for _ in range(c.num_layers)
            ]
        )
        if c.vace_layers is not None:
            assert c.vace_in_channels is not None
            self.vace_patch_embedding = nn.Conv3d(
                c.vace_in_channels, c.width, kernel_size=c.patch_size, stride=c.patch_size
            )
            self.vace_blocks = nn.ModuleList([ControlBlock(c, first=layer == 0) for layer in c.vace_layers])
        self.norm_out = WideLayerNorm(c.width, c.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(c.width, c.out_channels * math.prod(c.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, c.width) / c.width**0.5)
        _initialise(dict(self.named_modules()))
        self.start_from_text()

    def start_from_text(self, weight_of: Callable[[nn.Linear], Tensor] = _own_weight) -> None:
        """Where the concepts' keys and values start as the text's, they are now what the text's are.
        weight_of: reads a layer's weight, wherever it is."""
        if self.config.concept.keys == "text":
            for block in cast("list[Block]", list(self.blocks)):
                block.attn2.start_from_text(weight_of)

    def initialise_concepts(self, weight_of: Callable[[nn.Linear], Tensor] = _own_weight) -> None:
        """New values on the CPU for all that a plain Wan2.1 transformer does not have: a silent injection, or
        keys and values that start as the text's (see `start_from_text`).

        For a model that was built on the meta device, where nothing has values; the base is left alone.
        """
        new = {n: m for n, m in self.named_modules() if self._is_concept(f"{n}.") and m._parameters}
        for module in new.values():
            module.to_empty(device="cpu", recurse=False)
            cast("nn.Linear", module).reset_parameters()
        _initialise(new)
        self.start_from_text(weight_of)

    def concept_keys(self) -> set[str]:
        """State-dict keys that a Wan2.1 transformer does not have; an image-to-video one has all."""
        return {key for key in self.state_dict() if self._is_concept(key)}

    def _is_concept(self, key: str) -> bool:
        new = ("injector.", "add_k_proj.", "add_v_proj.", "norm_added_k.", "concept_proj.")
        return self.config.concept.injection != "base" and any(part in key for part in new)

    def _token_mask(self, concept_mask: Tensor) -> Tensor:
        """bool [K,N] -> bool [K,C]; where tokens are masked one by one it is [K,C] already."""
        q = self.config.concept.tokens_per_entry
        return concept_mask[:, :, None].expand(-1, -1, q).flatten(1).contiguous()  # of one it is a view

    def condition(self, text: Tensor, concept_tokens: Tensor, concept_mask: Tensor) -> Conditions:
        """Every block's cross-attention keys and values; they do not depend on time or latents.

        text [K,T,Dt] (zero where padded: Wan attends to all T tokens; or T fewer of them, and then a
        text_bias for `denoise`), concept_tokens [K,N,Q,Dc], or [N,Q,Dc]
        for the same concepts in every branch, concept_mask bool [K,N] ([K,C] where tokens are masked one by
        one). A masked concept's tokens are not
        read, not even when they are NaN. Keys come out normalised. For `base` the tokens are the picture
        encoder's, [K,N,P,Dp]. Raises ValueError for a mask of another length.
        """
        if self.config.concept.masks_tokens:
            concept_tokens = concept_tokens.flatten(-3, -2).unsqueeze(-2)  # [K,C,1,Dc]
        if concept_mask.dim() != 2 or concept_mask.shape[1] != concept_tokens.shape[-3]:
            wanted = f"[K,{concept_tokens.shape[-3]}]"
            raise ValueError(f"concept_mask must be bool {wanted}, not {list(concept_mask.shape)}")
        text = self.condition_embedder.text_embedder(text)  # [K,T,D]
        concepts = torch.where(concept_mask[:, :, None, None], concept_tokens, 0.0).flatten(1, 2)  # [K,C,Dc]
        if self.condition_embedder.image_embedder is not None:
            concepts = self.condition_embedder.image_embedder(concepts)  # [K,C,D]
        if self.concept_proj is not None:
            text = torch.cat((text, self.concept_proj(concepts)), dim=1)  # [K,T+C,D]
        every = cast("list[Block]", [*self.blocks, *self._control_blocks().values()])
        blocks = [block.conditions(text, concepts) for block in every]
        found = {
            name: torch.stack(parts)  # [layers,K,T|C,A,E]
            for name, parts in zip(KEYS_VALUES, zip(*blocks, strict=True), strict=False)
            if parts[0] is not None
        }
        if self.config.concept.scale != 1:
            found["concept_values"] = found["concept_values"] * self.config.concept.scale
        return found

    def denoise(
        self,
        latents: Tensor,
        time: Tensor,
        kv: Conditions,
        concept_mask: Tensor | None,
        conditioning: Tensor | None = None,
        guidance: Tensor | None = None,
        share: Share | None = None,
    ) -> Tensor:
        """The velocity (noise minus data) at these latents.

        latents [K,Cz,F,H,W] of any size that divides into patches, or [1,Cz,F,H,W] for all branches, whose
        first self-attention is then one; time [K] or [1] (sigma * 1000), kv from `condition`, perhaps with
        text_bias [K,T], concept_mask bool [K or R,N] as there (None: every concept is seen), conditioning
        [K or 1,Cg,F,H,W] (where pictures are frames): a mask of the frames that are pictures, then their
        latents; where they are `clean` of the first latent frame alone, [K or 1,Cg,1,H,W], and None for no
        picture; where they are a `control` what VACE's own blocks read; where they are tokens of their own
        (references.py), which a branch may not see by concept_mask, their latents [K or 1,Cz,N,H,W]; on
        grids of their own with the channel in front, float32 [1,1+Cz,N,side,side], and then kv may have
        `kept` int64 [P'], the places that are pictures. Returns [K,Cz,F,H,W].

        kv may have `boxes`, too, bool [S,N], or [K or 1,S,N]: which concept a token of the video may see at
        all (True: may), S = f*h*w patches in the order frame, row, column; a token that may see none gets
        exactly nothing from concepts. Without them all may see all. Raises ValueError for boxes of another
        shape, and where the configuration's mask is not `boxes`.

        guidance [K], whose sum is one: latents and time are those of all branches, and what returns is
        sum over k of guidance_k velocity_k, [1,Cz,F,H,W]. What follows the last norm is linear, so it is
        done once.

        share: a rank's: everything by branch is that of its branches, and what returns is what the network
        predicts for its branches and its tokens, before it becomes a velocity (see `velocity`), in float32
        and zero for other tokens, [K',Cz,F,H,W].
        """
        known, frame_time = latents, time
        if conditioning is not None and self.config.concept.given == "clean":
            known, frame_time = with_clean(latents, time, conditioning)  # [K,Cz,F,H,W], [K,F]
        elif conditioning is not None and self.config.concept.given not in ("control", *AS_TOKENS):
            shared = conditioning.expand(latents.shape[0], -1, -1, -1, -1)  # [K,Cg,F,H,W]
            known = torch.cat((latents, shared), dim=1)  # [K,Cz+Cg,F,H,W]
        square = None
        if conditioning is not None and self.config.concept.given == "grids":
            square = conditioning.shape[-1] // self.config.transformer.patch_size[-1]
        placed, rotary = self.positions(known, square)  # [K,Cz+Cg+p,F,H,W]
        patches = self.patch_embedding(placed)  # [K,D,f,h,w]
        grid, x = patches.shape[2:], patches.flatten(2).transpose(1, 2)  # x [K,S,D]
        tokens, among = x.shape[1], None
        if conditioning is not None and self.config.concept.given == "grids":
            told = conditioning, concept_mask, kv["text_keys"].shape[1], kv.get("kept")
            x, rotary, among = with_grids(x, rotary, self.patch_embedding, *told)  # [K,S+P,D]
        elif conditioning is not None and self.config.concept.given in AS_TOKENS:
            x = with_pictures(x, self.patch_embedding, conditioning, concept_mask)  # [K,S+R,D]
        elif self.config.concept.given == "grids":  # whose rows are in the tables, too
            rotary = rotary[0][:tokens], rotary[1][:tokens]

        embedding, modulation = self.condition_embedder.time(frame_time)  # [K,D], [K,6,D], or [K,F,…]
        part = None
        if share is not None:
            part = share.part(x.shape[1], 1 if modulation.dim() == 3 else modulation.shape[1])
        if part is not None:
            x, (cos, sin) = part.own(x), (part.own(table[None])[0] for table in rotary)
            rotary = cos, sin
        mask = None if concept_mask is None else self._token_mask(concept_mask)  # [K,C]
        bias = kv.get("text_bias")  # [K,T]
        boxes = self._boxes(kv, tokens, part)  # [K or 1,S,N]
        if self.config.concept.injection == "merged":
            keys = kv["text_keys"].shape[2]  # T+C
            if mask is None:
                bias = None if bias is None else F.pad(bias, (0, keys - bias.shape[1]))  # [K,T+C]
            else:
                if bias is not None:  # has the mask in it
                    concepts = torch.zeros_like(mask, dtype=bias.dtype).masked_fill(~mask, -math.inf)  # [K,C]
                    bias = torch.cat((bias, concepts), dim=1)  # [K,T+C]
                mask = torch.cat((mask.new_ones(mask.shape[0], keys - mask.shape[1]), mask), dim=1)  # [K,T+C]

        controls = self._control_blocks()
        count = len(self.blocks) + len(controls)
        conditions = [kv[name].unbind(0) if name in kv else [None] * count for name in KEYS_VALUES]
        every = (BlockConditions(*parts) for parts in zip(*conditions, strict=True))
        own = [one._replace(text_bias=bias, among=among, part=part, boxes=boxes) for one in every]
        control, later = self._control(conditioning, x, part), iter(own[len(self.blocks) :])
        for layer, (block, kv_) in enumerate(zip(self.blocks, own, strict=False)):
            x = block(x, modulation, rotary, kv_, mask)  # [K,S,D]
            if (beside := controls.get(layer)) is not None:
                control = _summed(beside(control, modulation, rotary, next(later), mask))  # [K,S,D]
                x = _with_hint(x, beside.proj_out(control))

        shift, scale = (self.scale_shift_table + embedding.unsqueeze(-2)).chunk(2, dim=-2)  # [K,1,D] each
        if isinstance(x, DeferredResidual):
            vectors = scale.squeeze(-2), shift.squeeze(-2)  # [K,D] each, or [K,F,D]
            _, last = residual_modulate(*x, *vectors, eps=self.norm_out.eps)  # [K,S,D]
        else:
            last = scaled(self.norm_out(x), 1 + scale, shift)  # [K,S,D]
        if share is not None:
            last = F.linear(wide(last), wide(self.proj_out.weight), wide(self.proj_out.bias))
            last = last if part is None else part.placed(last)  # [K',S+R,pf*ph*pw*Cz]
            return self._unpatch(last[:, :tokens], grid)  # [K',Cz,F,H,W]
        last = last[:, :tokens]  # without the pictures'
        if guidance is not None:
            last = wide(last)
            last = (guidance.type_as(last)[None] @ last.flatten(1)).unflatten(1, last.shape[1:])  # [1,S,D]
        last = last.to(self.proj_out.weight.dtype)
        output = self._unpatch(self.proj_out(last), grid)  # [K or 1,Cz,F,H,W]
        return self.velocity(output, latents, time)

    def _boxes(self, kv: Conditions, tokens: int, part: Part | None) -> Tensor | None:
        """[S,N] or [K or 1,S,N] -> [K or 1,S,N], or of a part's tokens. N may count tokens, where these are
        masked one by one."""
        if (boxes := kv.get("boxes")) is None:
            return None
        if self.config.concept.mask != "boxes":
            raise ValueError("boxes are for a model whose ConceptConfig.mask is 'boxes'")
        boxes = boxes[None] if boxes.dim() == 2 else boxes  # [K or 1,S,N]
        if boxes.dim() != 3:
            raise ValueError(f"boxes must be bool [S,N] or [K,S,N], not {list(boxes.shape)}")
        if boxes.shape[1] != tokens:
            raise ValueError(f"boxes must be of the video's {tokens} tokens, not of {boxes.shape[1]}")
        count, concept = boxes.shape[2], self.config.concept
        keys = kv["concept_keys"].shape[2] if "concept_keys" in kv else 0  # C
        if keys not in (count * concept.tokens_per_entry, count * concept.tokens_per_concept):
            held = keys // concept.tokens_per_concept
            raise ValueError(f"boxes must be of the {held} concepts that there are, not of {count}")
        return boxes if part is None else part.own(boxes)

    def velocity(self, output: Tensor, latents: Tensor, time: Tensor) -> Tensor:
        """What the network predicts [K,Cz,F,H,W] at these latents and this time, see `denoise`, as a velocity
        [K,Cz,F,H,W]."""
        if self.config.transformer.prediction == "velocity":
            return output
        sigma = (time / 1000.0).clamp(min=MIN_SIGMA)[:, None, None, None, None]  # [K,1,1,1,1]
        return ((wide(latents) - wide(output)) / sigma).type_as(latents)

    def _control_blocks(self) -> dict[int, ControlBlock]:
        """VACE's, by the number of the block that each one's hint is added behind."""
        layers = self.config.transformer.vace_layers
        return (
            {}
            if layers is None
            else dict(zip(layers, cast("list[ControlBlock]", self.vace_blocks), strict=True))
        )

    def _control(self, control: Tensor | None, x: Tensor, part: Part | None) -> Tensor | None:
        """What the first of VACE's blocks takes: control [1,Cg,F,H,W] and the video's tokens [K or 1,S,D],
        before any block, -> [K or 1,S,D]; None of any other model. part: whose tokens x is."""
        if control is None or self.config.concept.given != "control":
            return None
        patches = self.vace_patch_embedding(control).flatten(2).transpose(1, 2)  # [1,S,D]
        patches = patches if part is None else part.own(patches)
        return cast("Tensor", next(iter(self._control_blocks().values())).proj_in(patches) + x)

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text: Tensor,
        concept_tokens: Tensor,
        concept_mask: Tensor,
        conditioning: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """`condition`, then `denoise`, with their shapes."""
        kv = self.condition(text, concept_tokens, concept_mask)
        if boxes is not None:
            kv["boxes"] = boxes
        return self.denoise(latents, time, kv, concept_mask, conditioning)

    def _unpatch(self, x: Tensor, grid: torch.Size) -> Tensor:
        """[K,S,pf*ph*pw*Cz] -> [K,Cz,F,H,W], for a grid of f, h, w patches."""
        x = x.unflatten(1, grid).unflatten(-1, (*self.config.transformer.patch_size, -1))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [K,Cz,f,pf,h,ph,w,pw]
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # [K,Cz,F,H,W]
