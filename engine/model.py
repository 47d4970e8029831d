"""ConceptMaster assembled: encoders, concept modules and transformer, as one module to train and to store."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .concept_config import ENCODER_INPUTS
from .concepts import concept_binder, concept_encoder
from .config import ModelConfig
from .dit import ConceptDiT
from .encoders import ImageEncoder, TextEncoder


class ConceptMaster(nn.Module):
    """All that is trained beside the VAE. `qformer` and `dam` are the variants that the config names.

    With the injection `none` it is text encoder and transformer alone, with `base` picture encoder, too.
    `transformer_2` is the expert for low noise of a base of two transformers, None elsewhere.
    """

    transformer_2: ConceptDiT | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = TextEncoder(config.text_encoder)
        if config.concept.takes_pictures:
            c = config.concept
            gives = c.pictures, c.picture_layers or ()
            self.image_encoder = ImageEncoder(config.image_encoder, *gives, bare=c.injection == "base")
        if config.concept.has_modules:
            self.qformer = concept_encoder(config)
            self.dam = concept_binder(config)
        self.transformer = ConceptDiT(config)
        self.transformer_2 = None if config.boundary is None else ConceptDiT(config)

    def mask_by(self, mask: str) -> None:
        """Sets `ConceptConfig.mask`, of which no weight depends, from now on. Raises ConfigError where the
        injection cannot have it."""
        concept = dataclasses.replace(self.config.concept, mask=mask)
        self.config = dataclasses.replace(self.config, concept=concept)
        for transformer in self.experts().values():
            transformer.config = self.config

    def experts(self) -> dict[str, ConceptDiT]:
        """Every transformer by its name, in the order in which they run."""
        found = {"transformer": self.transformer, "transformer_2": self.transformer_2}
        return {name: module for name, module in found.items() if module is not None}

    def concepts(
        self, pixels: Tensor, label_ids: Tensor, label_mask: Tensor, box: Tensor | None = None
    ) -> Tensor:
        """Concept tokens of B*N (picture, label) pairs, all in one batch.

        pixels [B,N,3,px,px] (CLIP-normalised), label_ids int64 [B,N,L], label_mask bool [B,N,L], box [B,N,4]
        of an encoder that reads it, or None for all of the picture -> [B,N,Q,Dc]. Each label is encoded on
        its own. A padded slot may hold any finite pixels and an empty label. Zeros, which nothing reads, with
        the injection `none`; with `base` the picture tokens.
        """
        batch = pixels.shape[:2]
        if not self.config.concept.takes_pictures:
            return pixels.new_zeros(*batch, self.config.concept.tokens_per_concept, self.config.concept.width)
        pictures = self.image_encoder(pixels.flatten(0, 1))  # [B*N,P,Dp]
        if not self.config.concept.has_modules:
            return pictures.unflatten(0, batch)  # [B,N,P,Dp]
        mask = label_mask.flatten(0, 1)  # [B*N,L]
        known = {"label_mask": mask}
        if self.config.concept.reads_labels:
            known["label_text"] = self.text_encoder(label_ids.flatten(0, 1), mask)  # [B*N,L,Dt]
        known["box"] = whole_boxes(pictures) if box is None else box.flatten(0, 1)  # [B*N,4]
        return self.bound(pictures, known)[0].unflatten(0, batch)  # [B,N,Q,Dc]

    def bound(self, pictures: Tensor, known: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Concept tokens and visual queries, [M,Q,Dc] each, of picture tokens [M,P,Dp] and what is known
        besides: label_text [M,L,Dt] where a label is read, label_mask bool [M,L], box [M,4]."""
        concept = self.config.concept
        visual = self.qformer(pictures, *(known[n] for n in ENCODER_INPUTS.get(concept.encoder, ())))
        if concept.binding == "none":
            return visual, visual
        return self.dam(visual, known["label_text"], known["label_mask"]), visual

    def seen(self, concept_mask: Tensor, label_mask: Tensor) -> Tensor:
        """A mask of concepts bool [B,N] as the transformer wants it, by labels bool [B,N,L], or [N,L] for
        all: [B,C] where tokens are masked one by one."""
        concept = self.config.concept
        if not concept.masks_tokens:
            return concept_mask
        tokens = torch.cat([label_mask] * (concept.queries // label_mask.shape[-1]), dim=-1)  # [B,N,Q]
        return (concept_mask[:, :, None] & tokens).flatten(1)  # [B,C]

    def velocity(
        self,
        latents: Tensor,
        time: Tensor,
        token_ids: Tensor,
        token_mask: Tensor,
        pixels: Tensor,
        label_ids: Tensor,
        label_mask: Tensor,
        concept_mask: Tensor,
        conditioning: Tensor | None = None,
        box: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """The velocity (noise minus data) that the model predicts, with gradient everywhere; of two experts
        the first's, whatever the time.

        latents [B,Cz,F,H,W], time [B] (sigma * 1000), token_ids int64 [B,T], token_mask bool [B,T],
        pixels [B,N,3,px,px] (CLIP-normalised), label_ids int64 [B,N,L], label_mask bool [B,N,L],
        concept_mask bool [B,N] (False: padded or dropped), conditioning [B,Cg,F,H,W] for the
        injection `base`, see `ConceptDiT.denoise`; box: as for `concepts`; boxes bool [B or 1,S,N] for the
        mask `boxes`, as for `ConceptDiT.denoise`.
        Returns [B,Cz,F,H,W].
        """
        text = self.text_encoder(token_ids, token_mask)  # [B,T,Dt]
        concepts = self.concepts(pixels, label_ids, label_mask, box)  # [B,N,Q,Dc]
        seen = self.seen(concept_mask, label_mask)
        known = latents, time, text, concepts, seen, conditioning, boxes
        return self.transformer(*known)  # [B,Cz,F,H,W]


def whole_boxes(like: Tensor) -> Tensor:
    """A box that is all of the picture for each row of `like`, [M,4]."""
    return like.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(like), -1)
