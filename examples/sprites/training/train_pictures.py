"""Teach the picture encoder and the Q-Former to see, on reference pictures alone, before any video.

The paper's picture encoder is CLIP, which came trained; this world's starts from nothing, and the video's own
loss asks for colours long before it asks for patterns. Training-only heads ask early: one redraws the
concept upright from its visual queries, another names its texture, accessory and noun, and tells how the
texture runs: without that the tokens said that there were stripes, and not which way. Through the Q-Former
that question comes slowly, so it is put to the picture encoder alone first. Every step has looks of its own:
those that come back are learned by heart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptmaster.engine.concept_config import ConceptConfig
from conceptmaster.engine.concepts import QFormerLayer
from conceptmaster.engine.model import ConceptMaster

from ..arguments import check_counts, check_shares
from ..world.scenes import ACCESSORIES, NOUNS, TEXTURES
from .batches import Pictures, new_pictures
from .clip_arrays import PORTRAIT, RUNS
from .learning import MuonAdamW, autocast, schedule
from .loop import Log, LoopOptions, random_of, train

TRAITS = (len(TEXTURES), len(ACCESSORIES), len(NOUNS))
"""Kinds of each trait that ``TraitHead`` names."""
TRAIT_WEIGHT, PATTERN_WEIGHT = 0.1, 1.0
ALONE = 0.7
"""Share of the steps, and by far the cheapest ones, in which the picture encoder learns alone."""
JUDGED = 512
"""Pictures of held-out looks that are looked at for the log."""
PATCH = 4
"""Side of the squares that a portrait is drawn in."""
SQUARES = (PORTRAIT // PATCH) ** 2


class UprightHead(nn.Module):
    """How a concept looks, where every square of the portrait has its visual query: each tells its own.

    [M,Q,Dc] -> [M,3,32,32] in -1..1. The queries then are the concept put upright, square by square: what
    reads them finds a pattern where it is to be drawn, and need not make one of its angle and period.
    """

    def __init__(self, concept_width: int) -> None:
        super().__init__()
        self.out = nn.Linear(concept_width, 3 * PATCH * PATCH)

    def forward(self, queries: Tensor) -> Tensor:
        """Predicted pictures."""
        return F.fold(self.out(queries).transpose(1, 2), PORTRAIT, PATCH, stride=PATCH)


class PortraitHead(UprightHead):
    """How a concept looks: visual queries [M,Q,Dc] -> the sprite upright, [M,3,32,32] in -1..1.

    Each square of the portrait looks into the queries by cross-attention, as the video's tokens do.
    """

    def __init__(self, concept_width: int, heads: int = 4) -> None:
        super().__init__(concept_width)
        self.places = nn.Parameter(torch.randn(SQUARES, concept_width))
        self.layers = nn.ModuleList([QFormerLayer(concept_width, heads) for _ in range(2)])

    def forward(self, queries: Tensor) -> Tensor:
        """Predicted pictures."""
        x = self.places.expand(len(queries), -1, -1)
        for layer in self.layers:
            x = layer(x, queries)
        return super().forward(x)


class TraitHead(nn.Module):
    """What a concept is: visual queries [M,Q,Dc] -> logits of every trait, one [M,kinds] for each of
    ``TRAITS``, and at last how its texture runs, [M,RUNS]; by way of ``inner`` hidden units if there are any.
    """

    def __init__(self, queries: int, concept_width: int, inner: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(concept_width)
        width = queries * concept_width
        hidden = [nn.Linear(width, inner), nn.GELU()] if inner else []
        last = nn.Linear(inner or width, sum(TRAITS) + RUNS)
        nn.init.zeros_(last.weight)  # a model that is gone on from is not pushed about by a head's chance
        self.net = nn.Sequential(*hidden, last)

    def forward(self, queries: Tensor) -> tuple[Tensor, ...]:
        """Logits in the order of ``TRAITS``, then the runs."""
        return self.net(self.norm(queries).flatten(1)).split((*TRAITS, RUNS), dim=1)


def trait_losses(head: TraitHead, tokens: Tensor, traits: Tensor, patterns: Tensor) -> dict[str, Tensor]:
    """What ``head`` says of tokens [M,Q,Dc] against traits int64 [M,3] and patterns [M,RUNS], NaN where there
    is nothing to tell; ``texture`` is a share of right answers, no gradient. All zero for M = 0."""
    if len(tokens) == 0:
        return dict.fromkeys(("total", "pattern", "traits", "texture"), tokens.new_zeros(()))
    *logits, runs = head(tokens)
    asked = patterns.isfinite()
    pattern = (runs - patterns.nan_to_num()).square()[asked].sum() / asked.sum().clamp(min=1)
    named = sum((F.cross_entropy(part, traits[:, k]) for k, part in enumerate(logits)), tokens.new_zeros(()))
    right = (logits[0].argmax(1) == traits[:, 0]).float().mean()
    return {
        "total": TRAIT_WEIGHT * named + PATTERN_WEIGHT * pattern,
        "pattern": pattern,
        "traits": named,
        "texture": right,
    }


class PictureHeads(nn.Module):
    """What is asked of a picture: visual queries redraw the concept and tell its traits, and so do, by
    themselves, the picture encoder's tokens (``eye``)."""

    def __init__(self, concept: ConceptConfig) -> None:
        super().__init__()
        one_a_square = concept.encoder == "qformer" and concept.queries == SQUARES
        self.portrait = (UprightHead if one_a_square else PortraitHead)(concept.width)
        self.trait = TraitHead(concept.tokens_per_concept, concept.width)
        self.eye = TraitHead(1, concept.picture_dim, inner=256)

    def eye_losses(self, seen: Tensor, traits: Tensor, patterns: Tensor) -> dict[str, Tensor]:
        """``trait_losses`` of the picture encoder's tokens [M,P,Dp], as ``total`` and ``eye_*``."""
        losses = trait_losses(self.eye, seen.float().mean(1, keepdim=True), traits, patterns)
        return {name if name == "total" else f"eye_{name}": value for name, value in losses.items()}

    def forward(
        self, seen: Tensor, queries: Tensor, portraits: Tensor, traits: Tensor, patterns: Tensor
    ) -> dict[str, Tensor]:
        """Losses of picture tokens [M,P,Dp] and visual queries [M,Q,Dc] against portraits [M,3,32,32] in
        -1..1 and what ``trait_losses`` takes; all zero for M = 0."""
        losses = trait_losses(self.trait, queries, traits, patterns)
        eye, portrait = self.eye_losses(seen, traits, patterns), queries.new_zeros(())
        if len(queries):
            difference = self.portrait(queries) - portraits
            portrait = difference.abs().mean() + difference.square().mean()
        total = portrait + losses["total"] + eye["total"]
        return losses | eye | {"portrait": portrait, "total": total}


class Sight(nn.Module):
    """What is trained here: the parts of a model that see, and the heads."""

    def __init__(self, model: ConceptMaster, heads: PictureHeads) -> None:
        super().__init__()
        self.image_encoder, self.qformer, self.heads = model.image_encoder, model.qformer, heads

    def look(self, batch: Pictures) -> dict[str, Tensor]:
        """The losses of the picture encoder alone."""
        with autocast(str(batch.pixels.device)):
            seen = self.image_encoder(batch.pixels)
        return self.heads.eye_losses(seen, batch.traits, batch.patterns)

    def forward(self, batch: Pictures) -> dict[str, Tensor]:
        """The losses of ``PictureHeads``."""
        with autocast(str(batch.pixels.device)):
            seen = self.image_encoder(batch.pixels)  # [M,P,Dp]
            queries = self.qformer(seen).float()  # [M,Q,Dc]
        return self.heads(seen, queries, batch.portraits, batch.traits, batch.patterns)


@dataclass(frozen=True)
class PictureOptions:
    """How seeing is learned: a share ``alone`` of the steps the picture encoder, then all that sees. lr:
    Muon's. Raises InputError."""

    steps: int
    batch_size: int = 128
    seed: int = 0
    device: str = "cpu"
    lr: float = 0.012
    log_every: int = 50
    alone: float = ALONE

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size", "log_every")
        check_shares(self, "alone")


def learn_pictures(
    sight: Sight, checkpoint: Path, options: PictureOptions, adam_names: tuple[str, ...], log: Log
) -> None:
    """Train on reference pictures. ``log`` takes mean losses, with those of looks that are held out beside
    them. Resumes from ``checkpoint``, to the same weights."""
    optimizer = MuonAdamW(sight.named_parameters(), options.lr, 1.5e-3, adam_names=adam_names)
    turn = int(options.alone * options.steps)
    alone = turn / options.steps

    def seen(step: int, batch: Pictures) -> dict[str, Tensor]:
        return sight.look(batch) if step < turn else sight(batch)

    def rate(part: float) -> float:
        return schedule(part / alone if part < alone else (part - alone) / (1 - alone))

    def losses_of(step: int) -> dict[str, Tensor]:
        rng = random_of(options.seed, 2**32 + step)
        return seen(step, new_pictures(rng, options.batch_size, options.device))

    @torch.no_grad()
    def judged(steps: int) -> dict[str, float]:
        pictures = new_pictures(np.random.default_rng(0), JUDGED, options.device, held_out=True)
        found = seen(steps - 1, pictures)
        return {f"held_out_{name}": round(float(value), 4) for name, value in found.items()}

    how = LoopOptions("pictures", options.steps, rate=rate, log_every=options.log_every, also=(turn,))
    train(
        sight,
        optimizer,
        losses_of,
        how,
        log=lambda record: log({"phase": "pictures", **record}),
        checkpoint=checkpoint,
        publish=judged,
    )
