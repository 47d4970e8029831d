"""Teach text encoder and DAM to read, on captions alone, before any video."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptmaster.engine.model import ConceptMaster

from .batches import Pool
from .heads import StoryHead, coverage_loss
from .learning import MuonAdamW
from .loop import LoopOptions, train

FAST_NAMES = ("relative_attention_bias", "shared", "layer_norm")
"""What moves at ``FAST_LR`` while the caption is learned alone: at the usual rate words do not find their
neighbours ("a cat at the top left") for tens of thousands of samples, at this one within ten thousand."""
FAST_LR = 0.02
CAPTIONS = 64
"""In a step."""


def learn_captions(
    model: ConceptMaster,
    story: StoryHead,
    pool: Pool,
    steps: int,
    seed: int,
    device: str,
    adam_names: tuple[str, ...],
) -> list[float]:
    """Train text encoder, DAM and story head on captions alone, with noise for visual queries; mean losses
    per 25 steps.

    Cheap, and decisive: joint training from the start settles where captions tell the video no places, and
    stays there.
    """
    concept = model.config.concept
    parts = nn.ModuleDict({"text": model.text_encoder, "dam": model.dam, "story": story})
    optimizer = MuonAdamW(
        parts.named_parameters(),
        0.012,
        FAST_LR,
        adam_names=adam_names,
        fast_names=FAST_NAMES,
        fast_lr=FAST_LR,
    )
    patch = model.config.transformer.patch_size

    def losses_of(step: int) -> dict[str, Tensor]:
        batch = pool.captions(np.random.default_rng([seed, step]), CAPTIONS)
        text, filled = model.text_encoder(batch.token_ids, batch.token_mask), batch.label_mask.any(-1)
        mask = batch.label_mask[filled]
        tokens = torch.randn(len(mask), concept.tokens_per_concept, concept.width, device=device)
        if concept.binding != "none":
            tokens = model.dam(tokens, model.text_encoder(batch.label_ids[filled], mask), mask)
        concepts = tokens.new_zeros((*filled.shape, *tokens.shape[1:]))
        concepts[filled] = tokens
        target = F.avg_pool3d(batch.coverage.flatten(0, 1)[:, None], patch).flatten(1)
        logits = story(concepts, text, batch.token_mask).flatten(0, 1)
        return {"total": coverage_loss(logits, target, filled.flatten())}

    losses: list[float] = []
    how = LoopOptions("captions", steps, rate=lambda part: min(1.0, (1 - part) / 0.3), log_every=25)
    train(parts, optimizer, losses_of, how, log=lambda record: losses.append(record["total"]))
    return losses
