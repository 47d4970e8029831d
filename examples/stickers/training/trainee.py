"""The model with what only training needs: heads that ask early for what the concepts must carry.

None of the heads is shipped. ``layout`` asks the middle block where every concept is, ``story`` asks the
caption, ``portrait`` asks the visual queries how it looks, each for its own square of the upright picture.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.dit import LEAST_SIGMA
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.examples.sprites.heads import LayoutHead, StoryHead, coverage_loss
from conceptmaster.examples.sprites.train_pictures import UprightHead

from .batches import Batch, Captions

FOREGROUND = 3.0
"""Extra weight of the loss where a concept is."""
RARE = -2.0
"""Logit of a place's being covered that the story head begins with, as the layout head does."""
LAYOUT_WEIGHT, STORY_WEIGHT, PORTRAIT_WEIGHT = 1.0, 0.3, 0.5


class Trainee(nn.Module):
    """``forward`` gives the losses of one batch, and of captions alone that are learned beside it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = ConceptMaster(config)
        concept = config.concept
        grid = [n // p for n, p in zip(config.latent_shape[1:], config.transformer.patch_size, strict=True)]
        self.layout = LayoutHead(config.transformer.width, concept.width)
        self.story = StoryHead(concept.width, config.transformer.text_dim, int(np.prod(grid)))
        nn.init.constant_(self.story.net[-1].bias, RARE)  # type: ignore[arg-type]
        self.portrait = UprightHead(concept.width)
        self.middle = config.transformer.num_layers // 2 - 1

    def concepts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Concept tokens [B,N,Q,Dc] of the filled slots (zero elsewhere), and their visual queries [M,Q,Dc]."""
        model, filled = self.model, batch.label_mask.any(-1)  # [B,N]
        visual = model.qformer(model.image_encoder(batch.pixels[filled]))  # [M,Q,Dc]
        mask = batch.label_mask[filled]
        tokens = model.dam(visual, model.text_encoder(batch.label_ids[filled], mask), mask)
        out = tokens.new_zeros((*filled.shape, *tokens.shape[1:]))
        out[filled] = tokens
        return out, visual

    def velocity(
        self, batch: Batch, noisy: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Velocity [B,Cz,F,H,W], the middle block's tokens, text, and what ``concepts`` gives."""
        text = self.model.text_encoder(batch.token_ids, batch.token_mask)
        told = self.concepts(batch)
        kept: list[Tensor] = []
        handle = self.model.transformer.blocks[self.middle].register_forward_hook(
            lambda *a: kept.append(a[2])
        )
        velocity = self.model.transformer(noisy, sigma * 1000.0, text, told[0], batch.concept_mask)
        handle.remove()
        return velocity, kept[0], text, told

    def forward(
        self, batch: Batch, captions: Captions, noise: Tensor, sigma: Tensor, held: Tensor
    ) -> dict[str, Tensor]:
        """Losses: ``total`` and its parts. ``noise`` like the latents, ``sigma`` [B] in 0..1.

        Below the level ``held`` [B] the loss counts the data's error, not the velocity's, which is 1/sigma
        times that.
        """
        s = sigma[:, None, None, None, None]
        noisy = (1 - s) * batch.latents + s * noise
        velocity, hidden, text, (concepts, visual) = self.velocity(batch, noisy, sigma)
        weight = 1 + FOREGROUND * batch.coverage.sum(1, keepdim=True).clamp(max=1)  # [B,1,F,H,W]
        counted = s.clamp(min=LEAST_SIGMA) / torch.maximum(s, held[:, None, None, None, None])
        error = (velocity.float() - (noise - batch.latents)).square() * weight * counted.square()
        flow = error.mean() / weight.mean()
        patch = self.model.config.transformer.patch_size
        target = F.avg_pool3d(batch.coverage.flatten(0, 1)[:, None], patch).flatten(1)  # [B*N,S]
        logits = self.layout(hidden.float(), concepts.float()).flatten(0, 1)
        shown = batch.concept_mask.flatten()
        layout = coverage_loss(logits[shown], target[shown])
        told = shown & (batch.token_mask.sum(1) > 1).repeat_interleave(batch.concept_mask.shape[1])
        logits = self.story(concepts.float(), text.float(), batch.token_mask).flatten(0, 1)
        story = 0.5 * coverage_loss(logits[told], target[told]) + 0.5 * self.reading(captions)
        difference = self.portrait(visual.float()) - batch.portraits[batch.label_mask.any(-1)]
        portrait = difference.abs().mean() + difference.square().mean()
        total = flow + LAYOUT_WEIGHT * layout + STORY_WEIGHT * story + PORTRAIT_WEIGHT * portrait
        return {"total": total, "flow": flow, "layout": layout, "story": story, "portrait": portrait}

    def reading(self, captions: Captions) -> Tensor:
        """The story head's loss on captions alone, whose concepts have labels and noise for looks."""
        model, filled = self.model, captions.label_mask.any(-1)
        mask, concept = captions.label_mask[filled], model.config.concept
        visual = torch.randn(len(mask), concept.tokens_per_concept, concept.width, device=mask.device)
        tokens = model.dam(visual, model.text_encoder(captions.label_ids[filled], mask), mask)
        concepts = tokens.new_zeros((*filled.shape, *tokens.shape[1:]))
        concepts[filled] = tokens
        text = model.text_encoder(captions.token_ids, captions.token_mask)
        patch = model.config.transformer.patch_size
        target = F.avg_pool3d(captions.coverage.flatten(0, 1)[:, None], patch).flatten(1)
        logits = self.story(concepts.float(), text.float(), captions.token_mask).flatten(0, 1)
        return coverage_loss(logits[filled.flatten()], target[filled.flatten()])
