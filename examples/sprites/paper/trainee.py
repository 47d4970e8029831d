"""A row's model: the frozen base of all rows, and the row's own modules, which alone are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conceptmaster.engine.checkpoints.adapter import adapter_keys
from conceptmaster.engine.checkpoints.safetensors_io import load_strict
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.rival_encoders import selection_loss

from ..training.noising import HELD_SIGMA, flow_loss, noised
from ..training.tiling import tiled
from .boxes import seen_tokens, told_boxes
from .pool import Clips

FOREGROUND = 20.0
"""Extra weight of the loss where a concept is: elsewhere the base has nothing to learn from pictures."""
SELECTION = 0.1
"""Weight of SSR-Encoder's own second loss, as its paper has it."""


class Told(NamedTuple):
    """What the transformer gets of a batch: text [B,T,Dt], concept tokens [B,N,Q,Dc] (zero in empty slots),
    the mask of what is seen [B,N] (or of tokens, [B,C]), and which token of the video may see which concept,
    bool [B,S,N], where the row's mask is of boxes."""

    text: Tensor
    concepts: Tensor
    seen: Tensor
    boxes: Tensor | None


class Adapter(nn.Module):
    """A row's own parameters, by their names in the model ("/" for "."): what is trained, averaged, kept."""

    def __init__(self, model: ConceptMaster) -> None:
        super().__init__()
        own = adapter_keys(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in own)
            if name in own:
                self.register_parameter(name.replace(".", "/"), parameter)


class Trainee:
    """The model of a row. Its base is that of all rows, to the bit, before and after training; what is drawn
    by chance is the row's own, by its seed."""

    def __init__(self, config: ModelConfig, base: Mapping[str, Tensor], channels: Tensor, seed: int) -> None:
        """channels: what an error of each latent channel counts for, [Cz]."""
        torch.manual_seed(seed)
        self.channels = channels
        self.config, self.model = config, ConceptMaster(config)
        own = adapter_keys(self.model)
        fresh = {name: value for name, value in self.model.state_dict().items() if name in own}
        load_strict(self.model, {**base, **fresh})
        self.model.transformer.start_from_text()
        self.adapter = Adapter(self.model)

    def told(self, clips: Clips) -> Told:
        """What becomes of captions, pictures, labels and boxes."""
        model, concept, there = self.model, self.config.concept, clips.filled
        boxes, pictures, filled = told_boxes(clips.path), clips.pictures, there
        if concept.tiled is not None:
            filled = there.any(1, keepdim=True)  # [B,1]
            pictures = tiled(pictures, there)[:, None]
        text = model.text_encoder(clips.token_ids, clips.token_mask)
        concepts = text.new_zeros(*filled.shape, concept.tokens_per_concept, concept.width)
        if filled.any():
            slots = filled.shape[1]
            pairs = (
                pictures,
                clips.label_ids[:, :slots],
                clips.label_mask[:, :slots],
                boxes.mean(2)[:, :slots],
            )
            tokens = model.concepts(*(each[filled][:, None] for each in pairs))[:, 0]  # [M,Q,Dc]
            concepts = concepts.to(tokens.dtype).masked_scatter(filled[:, :, None, None], tokens)
        seen = model.seen(filled, clips.label_mask)
        return Told(
            text, concepts, seen, seen_tokens(boxes, self.config) if concept.mask == "boxes" else None
        )

    def loss(self, clips: Clips, noise: Tensor, sigma: Tensor) -> Tensor:
        """The loss of clips at the levels ``sigma`` [B] of ``noise``. Nothing is left out: without concepts
        this is the base, which is not trained."""
        told = self.told(clips)
        velocity = self.velocity(told, noised(clips.latents, noise, sigma), sigma)
        known = clips.latents, noise, sigma, clips.coverage, HELD_SIGMA
        flow = flow_loss(velocity, *known, foreground=FOREGROUND, channels=self.channels)
        if self.config.concept.encoder != "label_selected":
            return flow
        model, there = self.model, clips.filled
        label = model.text_encoder(clips.label_ids[there], clips.label_mask[there])  # [M,L,Dt]
        label = model.transformer.condition_embedder.text_embedder(label)  # [M,L,D]
        chosen = told.concepts[there].float(), label.float(), clips.label_mask[there]
        return flow + SELECTION * selection_loss(*chosen)

    def velocity(self, told: Told, noisy: Tensor, sigma: Tensor) -> Tensor:
        """The velocity [B,Cz,F,H,W] of noisy latents at the levels ``sigma`` [B]."""
        return self.model.transformer.denoise(noisy, sigma * 1000.0, self.condition(told), told.seen)

    def condition(self, told: Told) -> dict[str, Tensor]:
        """What the transformer's ``denoise`` reads."""
        found = self.model.transformer.condition(told.text, told.concepts, told.seen)
        return found if told.boxes is None else {**found, "boxes": told.boxes}
