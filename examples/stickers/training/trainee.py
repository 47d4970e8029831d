"""The model with what only training needs: heads that ask early for what the concepts must carry.

None of the heads is shipped. ``layout`` asks the middle block where every concept is and ``look`` how what is
there looks, ``story`` asks the caption for places, ``portrait`` asks the visual queries how a concept looks,
each for its own square of the upright picture.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.dit import MIN_SIGMA
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.examples.sprites.training.heads import LayoutHead, coverage_loss
from conceptmaster.examples.sprites.training.train_pictures import UprightHead

from ..world.tokens import END_ID
from .batches import Batch, Captions
from .windows import only

FOREGROUND = 3.0
"""Extra weight of the loss where a concept is."""
SHARP = 0.25
"""What the likeness of two words is multiplied by."""
RARE = -2.0
"""Logit of a place's being covered that the story head begins with, as the layout head does."""
LAYOUT_WEIGHT, STORY_WEIGHT, PORTRAIT_WEIGHT, LOOK_WEIGHT = 4.0, 0.5, 2.0, 3.0
THUMBNAIL = 8
"""Side of the picture of a concept that the middle block's tokens are asked for."""
LOOK_COVERAGE = 0.4
"""A video token is asked for the look of a concept that covers at least so much of it."""


class StoryHead(nn.Module):
    """Where what a label names will be, read from the caption alone: the label's words are looked for in the
    caption, [B,N,Dt] in [B,T,Dt], and what stands there tells the coverage, logits [B,N,S].

    Words are compared as they are, through one projection of both, so that those spelled alike match from
    the first step, whatever they are; what remains to be learned is to say places where the words stand.
    """

    def __init__(self, text_width: int, tokens: int, inner: int = 64) -> None:
        super().__init__()
        self.compare = nn.Linear(text_width, inner, bias=False)
        nn.init.orthogonal_(self.compare.weight)
        self.net = nn.Sequential(nn.Linear(text_width, 256), nn.GELU(), nn.Linear(256, tokens))
        nn.init.constant_(self.net[-1].bias, RARE)  # type: ignore[arg-type]

    def forward(self, named: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """``mask`` bool [B,T]: the caption's tokens."""
        scores = torch.einsum("bni,bti->bnt", self.compare(named), self.compare(text)) * SHARP
        found = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ text  # [B,N,Dt]
        return self.net(found)


class Trainee(nn.Module):
    """``forward`` gives the losses of one batch, and of captions alone that are learned beside it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = ConceptMaster(config)
        concept = config.concept
        grid = [n // p for n, p in zip(config.latent_shape[1:], config.transformer.patch_size, strict=True)]
        self.layout = LayoutHead(config.transformer.width, concept.width)
        self.story = StoryHead(config.transformer.text_dim, int(np.prod(grid)))
        self.portrait = UprightHead(concept.width)
        width = config.transformer.width
        self.look = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * THUMBNAIL**2))
        self.middle = config.transformer.num_layers // 2 - 1

    def concepts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Concept tokens [B,N,Q,Dc] of the filled slots (zero elsewhere), their visual queries [M,Q,Dc]."""
        model, filled = self.model, batch.label_mask.any(-1)  # [B,N]
        visual = model.qformer(model.image_encoder(batch.pixels[filled]))  # [M,Q,Dc]
        mask = batch.label_mask[filled]
        tokens = model.dam(visual, model.text_encoder(batch.label_ids[filled], mask), mask)
        out = tokens.new_zeros((*filled.shape, *tokens.shape[1:]))
        out[filled] = tokens
        return out, visual

    @property
    def heads(self) -> dict[str, Tensor]:
        """The heads' weights, by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def velocity(
        self, batch: Batch, noisy: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Velocity [B,Cz,F,H,W], the middle block's tokens, and what ``concepts`` gives."""
        text = self.model.text_encoder(batch.token_ids, batch.token_mask)
        told = self.concepts(batch)
        kept: list[Tensor] = []
        handle = self.model.transformer.blocks[self.middle].register_forward_hook(
            lambda *a: kept.append(a[2])
        )
        velocity = self.model.transformer(noisy, sigma * 1000.0, text, told[0], batch.concept_mask)
        handle.remove()
        return velocity, kept[0], told

    def forward(
        self,
        batch: Batch,
        captions: Captions,
        noise: Tensor,
        sigma: Tensor,
        held: Tensor,
        frames: slice | None = None,
    ) -> dict[str, Tensor]:
        """Losses: ``total`` and its parts. ``noise`` like the latents, ``sigma`` [B] in 0..1; ``frames``:
        which latent frames of whole clips the batch has, None for all.

        Below the level ``held`` [B] the loss counts the data's error, not the velocity's, which is 1/sigma
        times that.
        """
        s = sigma[:, None, None, None, None]
        noisy = (1 - s) * batch.latents + s * noise
        with only(self.model.transformer, frames):
            velocity, hidden, (concepts, visual) = self.velocity(batch, noisy, sigma)
        weight = 1 + FOREGROUND * batch.coverage.sum(1, keepdim=True).clamp(max=1)  # [B,1,F,H,W]
        counted = s.clamp(min=MIN_SIGMA) / torch.maximum(s, held[:, None, None, None, None])
        error = (velocity.float() - (noise - batch.latents)).square() * weight * counted.square()
        flow = error.mean() / weight.mean()
        target = self._tokens_covered(batch.coverage)
        logits = self.layout(hidden.float(), concepts.float()).flatten(0, 1)
        shown = batch.concept_mask.flatten()
        layout = coverage_loss(logits[shown], target[shown])
        story = self.reading(captions)
        difference = self.portrait(visual.float()) - batch.portraits[batch.label_mask.any(-1)]
        portrait = difference.abs().mean() + difference.square().mean()
        look = self._looks(batch, hidden, target.unflatten(0, batch.concept_mask.shape))
        total = flow + LAYOUT_WEIGHT * layout + STORY_WEIGHT * story
        total = total + PORTRAIT_WEIGHT * portrait + LOOK_WEIGHT * look
        losses = {"flow": flow, "layout": layout, "story": story, "portrait": portrait, "look": look}
        return {"total": total, **losses}

    def _looks(self, batch: Batch, hidden: Tensor, coverage: Tensor) -> Tensor:
        """The error of what the middle block's tokens [B,S,D] tell of the look of the concept that covers
        most of them, coverage [B,N,S]; zero where no concept is shown."""
        most, which = (coverage * batch.concept_mask[..., None]).max(1)  # [B,S]
        rows, columns = torch.nonzero(most > LOOK_COVERAGE, as_tuple=True)
        if len(rows) == 0:
            return hidden.new_zeros(())
        faces = F.avg_pool2d(batch.portraits.flatten(0, 1), batch.portraits.shape[-1] // THUMBNAIL)
        wanted = faces.unflatten(0, batch.concept_mask.shape)[rows, which[rows, columns]].flatten(1)
        return (self.look(hidden[rows, columns].float()) - wanted).square().mean()

    def reading(self, captions: Captions) -> Tensor:
        """The story head's loss on captions alone."""
        model, filled = self.model, captions.label_mask.any(-1)  # [B,N]
        ids, mask = captions.label_ids[filled], captions.label_mask[filled]  # [M,L]
        label = model.text_encoder(ids, mask)  # [M,L,Dt]
        words = mask & (ids != END_ID)
        named = (label * words[..., None]).sum(1) / words.sum(1, keepdim=True)  # [M,Dt]
        asked = named.new_zeros((*filled.shape, named.shape[-1]))
        asked[filled] = named
        text = model.text_encoder(captions.token_ids, captions.token_mask)
        target = self._tokens_covered(captions.coverage)
        logits = self.story(asked.float(), text.float(), captions.token_mask).flatten(0, 1)
        return coverage_loss(logits[filled.flatten()], target[filled.flatten()])

    def _tokens_covered(self, coverage: Tensor) -> Tensor:
        """How much of every video token concepts cover: [B,N,F,H,W] -> [B*N,S]."""
        patch = self.model.config.transformer.patch_size
        return F.avg_pool3d(coverage.flatten(0, 1)[:, None], patch).flatten(1)
