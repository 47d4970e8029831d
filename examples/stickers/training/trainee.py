"""The model with what only training needs: heads that ask early for what the concepts must carry.

None of the heads is shipped. ``layout`` asks the middle block where every concept is, ``look`` how what is
there looks and ``pose`` how it is turned, how large it is and where; ``story`` asks the caption for places,
``motion`` and ``scenery`` ask it, as the transformer reads it, for motions and for the background;
``portrait`` asks the visual queries how a concept looks, each for its own square of the upright picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.dit import MIN_SIGMA
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.examples.sprites.training.heads import LayoutHead, coverage_loss, masked_mean
from conceptmaster.examples.sprites.training.train_pictures import UprightHead

from ..world.scenes import MOTIONS, SIDE
from ..world.tokens import END_ID
from .batches import BARE, Batch, Captions
from .windows import only

FOREGROUND = 3.0
"""Extra weight of the loss where a concept is."""
SHARP = 0.25
"""What the likeness of two words is multiplied by."""
RARE = -2.0
"""Logit of a place's being covered that the story head begins with, as the layout head does."""
FLOW_WEIGHT, LAYOUT_WEIGHT, STORY_WEIGHT, SCENERY_WEIGHT, MOTION_WEIGHT = 5.0, 4.0, 0.5, 1.0, 1.0
PORTRAIT_WEIGHT, LOOK_WEIGHT, POSE_WEIGHT = 2.0, 3.0, 3.0
LEAST_SPREAD = 1e-4
"""Backgrounds of a batch that differ less count as if they differed so much."""
THUMBNAIL = 8
"""Side of the picture of a concept that the middle block's tokens are asked for."""
LOOK_COVERAGE = 0.4
"""A video token is asked for the look, and the pose, of a concept that covers at least so much of it."""
POSES = 5
"""Numbers of a pose: sine and cosine of the turn, size, and where the middle is from the token's, across
and down."""
USUAL, NEAR = 10.0, 8.0
"""Units of a usual size, of which powers of two are told, and those in which places are told."""


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

    def where(self, named: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Which words of the caption labels are, [B,N,T], in sum one; ``mask`` bool [B,T]: its tokens."""
        scores = torch.einsum("bni,bti->bnt", self.compare(named), self.compare(text)) * SHARP
        return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)

    def forward(self, text: Tensor, where: Tensor) -> Tensor:
        """The caption's text [B,T,Dt], and where labels are in it."""
        return self.net(where @ text)


class Trainee(nn.Module):
    """``forward`` gives the losses of one batch, and of captions alone that are learned beside it.

    Its shapes follow from a batch's alone, never from what is in it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = ConceptMaster(config)
        concept = config.concept
        self.layout = LayoutHead(config.transformer.width, concept.width)
        grid = [n // p for n, p in zip(config.latent_shape[1:], config.transformer.patch_size, strict=True)]
        self.story = StoryHead(config.transformer.text_dim, int(np.prod(grid)))
        self.portrait = UprightHead(concept.width)
        width = config.transformer.width
        self.look = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * THUMBNAIL**2))
        channels, _, rows, _ = config.latent_shape
        self.scenery = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels * rows))
        self.motion = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(MOTIONS)))
        self.pose = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * POSES))
        steps = [(torch.arange(n) + 0.5) * (SIDE / NEAR / n) for n in grid[1:]]
        down, across = torch.meshgrid(*steps, indexing="ij")
        middles = F.pad(torch.stack([across, down], -1).flatten(0, 1), (POSES - 2, 0))
        self.middles: Tensor  # of a frame's tokens, [S/F,5]
        self.register_buffer("middles", middles, persistent=False)
        self.middle = config.transformer.num_layers // 2 - 1

    @property
    def heads(self) -> dict[str, Tensor]:
        """The heads' weights, by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile a step by parts, each without a break: a block and its keys and values once for all blocks,
        what reads, what sees, and what is asked of it all. Batches of another shape are compiled anew."""
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

        for block in cast("list[Any]", self.model.transformer.blocks):
            block.forward = compiled(block.forward)  # not the block: it keeps its hooks
            block.conditions = compiled(block.conditions)
        for name in ("read", "see", "asked"):
            setattr(self, name, compiled(getattr(self, name)))

    def read(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Tokens [B,T] of captions, or of labels, as text [B,T,Dt]."""
        return self.model.text_encoder(token_ids, token_mask)

    def see(self, pixels: Tensor, label: Tensor, label_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Concept tokens [M,Q,Dc] and visual queries [M,Q,Dc] of pictures [M,3,px,px] with their labels' text
        [M,L,Dt]."""
        visual = self.model.qformer(self.model.image_encoder(pixels))  # [M,Q,Dc]
        return self.model.dam(visual, label, label_mask), visual

    def velocity(
        self, batch: Batch, noisy: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Velocity [B,Cz,F,H,W], the middle block's tokens, concept tokens [B,N,Q,Dc] of the filled slots
        (zero elsewhere) and their visual queries [M,Q,Dc]."""
        text = self.read(batch.token_ids, batch.token_mask)
        return self._velocity(batch, noisy, sigma, text, self.read(*_labels(batch)))

    def _velocity(
        self, batch: Batch, noisy: Tensor, sigma: Tensor, text: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        slots = batch.concept_mask.shape  # [B,N]
        pixels = batch.pixels.flatten(0, 1)[batch.filled]
        tokens, visual = self.see(pixels, label, _labels(batch)[1])
        concepts = tokens.new_zeros(slots.numel(), *tokens.shape[1:]).index_copy(0, batch.filled, tokens)
        concepts = concepts.unflatten(0, slots)  # [B,N,Q,Dc]
        kept: list[Tensor] = []
        handle = self.model.transformer.blocks[self.middle].register_forward_hook(
            lambda *a: kept.append(a[2])
        )
        boxes = {"boxes": batch.boxes} if self.model.config.concept.mask == "boxes" else {}
        told = noisy, sigma * 1000.0, text, concepts, batch.concept_mask
        velocity = self.model.transformer(*told, **boxes)
        handle.remove()
        return velocity, kept[0], (concepts, visual)

    def forward(
        self,
        batch: Batch,
        captions: Captions,
        noise: Tensor,
        sigma: Tensor,
        frames: slice | None = None,
    ) -> dict[str, Tensor]:
        """Losses: ``total`` and its parts. ``noise`` like the latents, ``sigma`` [B] in 0..1; ``frames``:
        which latent frames of whole clips the batch has, None for all.

        The loss counts the data's error, not the velocity's, which is 1/sigma times that: at low levels,
        where a narrow model cannot give its input back and a sampler of four steps never comes, it would
        outweigh the high ones, where captions are followed, five to one.
        """
        s = sigma[:, None, None, None, None]
        noisy = (1 - s) * batch.latents + s * noise
        both = (torch.cat(pair) for pair in zip(_captions(batch), _captions(captions), strict=True))
        text, beside = self.read(*both).split([len(sigma), len(captions.token_ids)])
        both = (torch.cat(pair) for pair in zip(_labels(batch), _labels(captions), strict=True))
        label, named = self.read(*both).split([len(batch.filled), len(captions.filled)])
        with only(self.model.transformer, frames):
            velocity, hidden, told = self._velocity(batch, noisy, sigma, text, label)
        return self.asked(batch, noise, s, velocity, hidden, *told, text, captions, named, beside)

    def asked(
        self,
        batch: Batch,
        noise: Tensor,
        s: Tensor,
        velocity: Tensor,
        hidden: Tensor,
        concepts: Tensor,
        visual: Tensor,
        text: Tensor,
        captions: Captions,
        named: Tensor,
        beside: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of what came out, see ``forward``; ``text``: the batch's; ``beside`` and ``named``: that
        of captions alone and of their labels."""
        weight = 1 + FOREGROUND * batch.coverage.sum(1, keepdim=True).clamp(max=1)  # [B,1,F,H,W]
        missed = (velocity.float() - (noise - batch.latents)) * s.clamp(min=MIN_SIGMA)
        error = missed.square() * weight
        flow = error.mean() / weight.mean()
        target = self._tokens_covered(batch.coverage)  # [B,N,S]
        layout = coverage_loss(self.layout(hidden.float(), concepts.float()), target, batch.concept_mask)
        story, motion = self._story(captions, named, beside)
        difference = self.portrait(visual.float()) - batch.portraits.flatten(0, 1)[batch.filled]
        portrait = difference.abs().mean() + difference.square().mean()
        look, pose = self._looks(batch, hidden, target), self._poses(batch, hidden, target)
        scenery = self._scenery(batch, text)
        total = FLOW_WEIGHT * flow + LAYOUT_WEIGHT * layout + STORY_WEIGHT * story
        total = total + SCENERY_WEIGHT * scenery + MOTION_WEIGHT * motion
        total = total + PORTRAIT_WEIGHT * portrait + LOOK_WEIGHT * look + POSE_WEIGHT * pose
        losses = {"flow": flow, "layout": layout, "story": story, "scenery": scenery, "motion": motion}
        return {"total": total, **losses, "portrait": portrait, "look": look, "pose": pose}

    def _scenery(self, batch: Batch, text: Tensor) -> Tensor:
        """The error of what the caption's embedding in the transformer tells of the background, the latents'
        means by rows; as a share of what these means differ in the batch."""
        bare = (batch.coverage.sum(1, keepdim=True) <= BARE).float()  # [B,1,F,H,W]
        count = bare.sum((2, 4))  # [B,1,H]
        wanted = (batch.latents * bare).sum((2, 4)) / count.clamp(min=1)  # [B,Cz,H]
        seen = (count > 0).float()
        spread = ((wanted - wanted.mean(0)).square() * seen).mean().clamp(min=LEAST_SPREAD)
        embedded = self.embedded(text)
        error = (self.told_scenery(embedded, batch.token_mask).view_as(wanted) - wanted).square()
        return (error * seen).mean() / spread

    def embedded(self, text: Tensor) -> Tensor:
        """Text [B,T,Dt] as the transformer reads it, [B,T,D]."""
        return self.model.transformer.condition_embedder.text_embedder(text).float()

    def told_scenery(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """What embedded captions tell of the background, [B,Cz*H]; ``mask`` bool [B,T]."""
        shown = mask[..., None]
        return self.scenery((embedded * shown).sum(1) / shown.sum(1))

    def _looks(self, batch: Batch, hidden: Tensor, coverage: Tensor) -> Tensor:
        """The error of what the middle block's tokens [B,S,D] tell of the look of the concept that covers
        most of them, coverage [B,N,S]; zero where no concept is shown."""
        most, which = (coverage * batch.concept_mask[..., None]).max(1)  # [B,S]
        faces = F.avg_pool2d(batch.portraits.flatten(0, 1), batch.portraits.shape[-1] // THUMBNAIL)
        faces = faces.flatten(1).unflatten(0, batch.concept_mask.shape)  # [B,N,3*8*8]
        wanted = faces.gather(1, which[..., None].expand(-1, -1, faces.shape[-1]))  # [B,S,3*8*8]
        error = (self.look(hidden.float()) - wanted).square()
        return masked_mean(error, (most > LOOK_COVERAGE)[..., None])

    def _poses(self, batch: Batch, hidden: Tensor, coverage: Tensor) -> Tensor:
        """The error of what the middle block's tokens [B,S,D] tell of the pose, in every frame, of the
        concept that covers most of them, coverage [B,N,S]: where captions are followed, and of some poses
        nothing else asks, such as how what spins is turned."""
        most, which = (coverage * batch.concept_mask[..., None]).max(1)  # [B,S]
        x, y, size, turn = batch.track.unbind(-1)  # [B,N,F,4]
        size = 2 * (size.clamp(min=1) / USUAL).log2()
        tracks = torch.stack([turn.sin(), turn.cos(), size, x / NEAR, y / NEAR], -1).flatten(3)  # [B,N,F,20]
        every = tracks.repeat_interleave(coverage.shape[-1] // tracks.shape[2], 2)  # [B,N,S,20]
        wanted = every.gather(1, which[:, None, :, None].expand(-1, -1, -1, every.shape[-1]))[:, 0]
        wanted = wanted - self.middles.repeat(1, 4).tile(tracks.shape[2], 1)  # [B,S,20]
        error = (self.pose(hidden.float()) - wanted).square()
        return masked_mean(error, (most > LOOK_COVERAGE)[..., None])

    def reading(self, captions: Captions, text: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of story and motion head on captions alone, as text [B,T,Dt]."""
        return self._story(captions, self.read(*_labels(captions)), text)

    def _story(self, captions: Captions, label: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Of captions as text [B,T,Dt] with that of their labels, [M,L,Dt]."""
        ids, mask = _labels(captions)  # [M,L]
        words = mask & (ids != END_ID)
        named = (label * words[..., None]).sum(1) / words.sum(1, keepdim=True)  # [M,Dt]
        slots = captions.label_mask.shape[:2]  # [B,N]
        asked = named.new_zeros(slots.numel(), named.shape[-1]).index_copy(0, captions.filled, named)
        where = self.story.where(asked.unflatten(0, slots).float(), text.float(), captions.token_mask)
        there = captions.label_mask.any(-1)  # [B,N]
        covered = self._tokens_covered(captions.coverage)
        story = coverage_loss(self.story(text.float(), where), covered, there)
        logits = self.motion(where @ self.embedded(text))  # [B,N,11]
        missed = F.cross_entropy(logits.flatten(0, 1), captions.motion.flatten(), reduction="none")
        return story, masked_mean(missed, there.flatten())

    def _tokens_covered(self, coverage: Tensor) -> Tensor:
        """How much of every video token concepts cover: [B,N,F,H,W] -> [B,N,S]."""
        patch = self.model.config.transformer.patch_size
        return F.avg_pool3d(coverage, patch).flatten(2)


def _captions(batch: Batch | Captions) -> tuple[Tensor, Tensor]:
    return batch.token_ids, batch.token_mask


def _labels(batch: Batch | Captions) -> tuple[Tensor, Tensor]:
    """Token ids and masks [M,L] of the labels that there are."""
    ids, mask = batch.label_ids.flatten(0, 1), batch.label_mask.flatten(0, 1)
    return ids[batch.filled], mask[batch.filled]
