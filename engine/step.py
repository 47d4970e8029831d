"""What runs around the transformer, `Condition` once per request and `DenoiseStep` once per step, and the
modules of all graphs: they are what is exported, and what the torch backend runs.

Letters: K guidance branches, N concepts, Q tokens per concept, C = N*Q, T text tokens, M solver states,
Cz F H W latents, A heads, E head width, Dt text width, Dc concept width, Cg channels of the conditioned
frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .blocks import KEYS_VALUES
from .dit import ConceptDiT
from .guidance import projected
from .model import ConceptMaster
from .references import AS_TOKENS
from .shares import Share
from .vae.wan_area_encoder import EncodeArea
from .vae.wan_decoder import streaming_decoders
from .vae.wan_encoder import EncodePicture, streaming_encoders

if TYPE_CHECKING:
    from .vae.wan_decoder import VAE


DATA = 2
"""The state's slot of the newest estimate of the data (runtime/solver.py)."""


def condition_names(injection: str) -> tuple[str, ...]:
    """The outputs of `Condition`, which `DenoiseStep` reads; `merged` has the concepts' tokens in the text's,
    and `none` has no concepts."""
    return KEYS_VALUES[:2] if injection in ("merged", "none") else KEYS_VALUES


class Condition(nn.Module):
    """(text [K,T,Dt], concept_tokens [N,Q,Dc], concept_mask bool [K,N]) -> every block's keys and values.

    The last two may be None where the injection is `none`. seeing: R, how many branches, the last ones, see
    concepts at all: only theirs are computed. None: all K.
    """

    def __init__(self, transformer: ConceptDiT, seeing: int | None = None) -> None:
        super().__init__()
        self.transformer, self.seeing = transformer, seeing

    def forward(
        self, text: Tensor, concept_tokens: Tensor | None = None, concept_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """In the order of `condition_names`: two tensors [layers,K,T|T+C,A,E], then (unless the injection is
        `merged`) two [layers,K|R,C,A,E]."""
        c = self.transformer.config.concept
        if concept_tokens is None or concept_mask is None:
            concept_tokens = text.new_zeros(c.max_concepts, c.tokens_per_concept, c.width)
            concept_mask = torch.zeros(len(text), c.max_concepts, dtype=torch.bool, device=text.device)
        if self.seeing is not None:
            concept_mask = concept_mask[-self.seeing :]  # [R,N]
        return tuple(self.transformer.condition(text, concept_tokens, concept_mask).values())


class DenoiseStep(nn.Module):
    """One step of the solver: guidance and update around the transformer.

    state [M,Cz,F,H,W], time [1] (sigma * 1000), concept_mask bool [K,N], guidance [K], coefficients
    [M,M+1], for an image-to-video base its frame conditioning, called given, [1,Cg,F,H,W], for the mask
    `boxes` these, bool [S,N] of the video's tokens (see `ConceptDiT.denoise`), then the tensors of
    `Condition`, and if `biased`, where one of its keys stands for all padding, text_bias [K,T] -> next
    state [M,Cz,F,H,W]. State and update are float32, whatever the transformer's dtype.
    """

    def __init__(self, transformer: ConceptDiT, biased: bool = False) -> None:
        super().__init__()
        self.transformer = transformer
        frames = ["given"] if transformer.config.conditioning_channels else []
        boxes = ["boxes"] if transformer.config.concept.mask == "boxes" else []
        keys_values = condition_names(transformer.config.concept.injection)
        self.names = [*frames, *boxes, *keys_values, *(["text_bias"] if biased else [])]

    def forward(
        self,
        state: Tensor,
        time: Tensor,
        concept_mask: Tensor,
        guidance: Tensor,
        coefficients: Tensor,
        *known: Tensor,
    ) -> Tensor:
        """`update` with the guided velocity at the state's first row."""
        named = dict(zip(self.names, known, strict=True))
        found = self.velocity(state, time, guidance, coefficients, concept_mask, **named)
        return update(state, found, coefficients)

    def velocity(
        self,
        state: Tensor,
        time: Tensor,
        guidance: Tensor,
        coefficients: Tensor,
        concept_mask: Tensor | None = None,
        given: Tensor | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """sum over k of guidance_k velocity_k(state_0), float32 [1,Cz*F*H*W]; the guidance's sum is one. Or
        what guidance.py makes of them.

        concept_mask: None where every concept of `conditions` is seen, and for `none`; conditions: what
        `Condition` gave, by name, and perhaps text_bias and boxes.
        """
        concept_mask, frames = self._pictured(concept_mask, given, len(guidance))
        latents = self._latents(state)  # [1,Cz,F,H,W]
        known = latents, time, conditions, concept_mask, frames
        if self.transformer.config.guidance_rule == "linear":
            return self.transformer.denoise(*known, guidance).flatten(1).float()
        return self._projected(self.transformer.denoise(*known), state, coefficients, guidance)

    def told(
        self,
        share: Share,
        state: Tensor,
        time: Tensor,
        concept_mask: Tensor | None = None,
        given: Tensor | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """A rank's share of what the network predicts for all branches, float32 [K,Cz,F,H,W]: zero elsewhere,
        so that the sum over the ranks is the whole, to the bit. state: its first row is enough; the rest as
        in `velocity`."""
        concept_mask, frames = self._pictured(concept_mask, given, share.branches)
        concept_mask = None if concept_mask is None else share.of(concept_mask)
        if concept_mask is not None and not len(concept_mask) and self._own_grids:
            concept_mask = frames = None  # none of its branches sees a picture
        known = self._latents(state), time, share.conditions(conditions), concept_mask, frames
        return share.placed(self.transformer.denoise(*known, share=share))

    def guided(
        self, told: Tensor, state: Tensor, time: Tensor, guidance: Tensor, coefficients: Tensor
    ) -> Tensor:
        """What `velocity` gives, of the sum of what the ranks told."""
        velocities = self.transformer.velocity(told, self._latents(state).float(), time)  # [K,Cz,F,H,W]
        if self.transformer.config.guidance_rule == "linear":
            return guidance[None] @ velocities.flatten(1)
        return self._projected(velocities, state, coefficients, guidance)

    @property
    def _own_grids(self) -> bool:
        return self.transformer.config.concept.given == "grids"

    def _latents(self, state: Tensor) -> Tensor:
        return state[:1].to(self.transformer.patch_embedding.weight.dtype)

    def _pictured(
        self, concept_mask: Tensor | None, given: Tensor | None, branches: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Mask and frames as the transformer takes them."""
        if given is not None and not self._own_grids:  # whose numbers are no latents alone
            given = given.to(self.transformer.patch_embedding.weight.dtype)
        elif concept_mask is not None and given is not None:
            concept_mask = concept_mask[min(1, branches - 1) :]  # the first of several sees none
        return concept_mask, given

    def _projected(self, velocities: Tensor, state: Tensor, coefficients: Tensor, guidance: Tensor) -> Tensor:
        # every solver's third row is the estimate of the data, state_0 - sigma velocity
        sigma = -coefficients[DATA, -1:]  # [1]
        return projected(velocities, state[:1], sigma, guidance).flatten(1)


def update(state: Tensor, velocity: Tensor, coefficients: Tensor) -> Tensor:
    """coefficients [M,M+1] times [state_0 .. state_{M-1}, velocity]: [M,Cz,F,H,W] and [1,Cz*F*H*W] ->
    [M,Cz,F,H,W]."""
    seen = torch.cat((state.flatten(1), velocity))  # [M+1,Cz*F*H*W]
    return (coefficients @ seen).unflatten(1, state.shape[1:])  # [M,Cz,F,H,W]


def expert_modules(
    name: str, transformer: ConceptDiT, biased: bool = False, seeing: int | None = None
) -> dict[str, nn.Module]:
    """Of one of `ConceptMaster.experts` the modules of its two graphs by their names, see `graph_modules`."""
    end = name.removeprefix("transformer")  # of the graphs' names, too
    return {
        f"condition{end}": Condition(transformer, seeing),
        f"denoise{end}": DenoiseStep(transformer, biased),
    }


def graph_modules(
    model: ConceptMaster, vae: VAE, biased: bool = False, seeing: int | None = None
) -> dict[str, nn.Module]:
    """The module of every graph by its name: its inputs are the graph's, in their order, and so its outputs.

    biased: of `DenoiseStep`; seeing: of `Condition`. Modules share their weights with `model` and `vae`.
    """
    experts = model.experts()
    modules = {name: child for name, child in model.named_children() if name not in experts}
    for name, transformer in experts.items():
        modules |= expert_modules(name, transformer, biased, seeing)
    modules |= zip(("decode_first", "decode"), streaming_decoders(vae), strict=True)
    if model.config.concept.given == "grids":  # so it is Wan's VAE
        modules["encode_first"] = EncodeArea(cast("Any", vae)).eval()
    elif model.config.concept.given in ("clean", *AS_TOKENS):
        modules["encode_first"] = EncodePicture(cast("Any", vae)).eval()
    elif model.config.conditioning_channels:
        pair = streaming_encoders(cast("Any", vae))
        modules |= zip(("encode_first", "encode"), pair, strict=True)
    return modules
