"""Teach text encoder and DAM to read, on captions alone, before any video."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .batches import LatentPool
from .heads import coverage_loss
from .learning import MuonAdamW, gradient_norm

if TYPE_CHECKING:
    from .train_model import Trainee

FAST_NAMES = ("relative_attention_bias", "shared", "layer_norm")
"""What moves at ``FAST_LR`` while the caption is learned alone: at the usual rate words do not find their
neighbours ("a cat at the top left") for tens of thousands of samples, at this one within ten thousand."""
FAST_LR = 0.02


def learn_captions(
    trainee: Trainee,
    pool: LatentPool,
    *,
    steps: int,
    seed: int,
    device: str,
    adam_names: tuple[str, ...],
    batch_size: int = 64,
) -> list[float]:
    """Train text encoder, DAM and story head on captions alone, with noise for visual queries; mean losses
    per 25 steps.

    Cheap, and decisive: joint training from the start settles where captions tell the video no places, and
    stays there.
    """
    if steps == 0:
        return []
    model, concept = trainee.model, trainee.model.config.concept
    parts = nn.ModuleDict({"text": model.text_encoder, "dam": model.dam, "story": trainee.story})
    optimizer = MuonAdamW(
        parts.named_parameters(),
        0.012,
        FAST_LR,
        adam_names=adam_names,
        fast_names=FAST_NAMES,
        fast_lr=FAST_LR,
    )
    patch = model.config.transformer.patch_size
    losses: list[float] = []
    for step in tqdm(range(steps), desc="captions", disable=None):
        optimizer.set_scale(min(1.0, (steps - step) / (0.3 * steps)))
        batch = pool.captions(np.random.default_rng([seed, step]), batch_size).to(device)
        text, filled = model.text_encoder(batch.token_ids, batch.token_mask), batch.label_mask.any(-1)
        mask = batch.label_mask[filled]
        visual = torch.randn(len(mask), concept.tokens_per_concept, concept.width, device=device)
        tokens = visual
        if concept.binding != "none":
            tokens = model.dam(visual, model.text_encoder(batch.label_ids[filled], mask), mask)
        concepts = tokens.new_zeros((*filled.shape, *tokens.shape[1:]))
        concepts[filled] = tokens
        target = F.avg_pool3d(batch.coverage.flatten(0, 1)[:, None], patch).flatten(1)
        logits = trainee.story(concepts, text, batch.token_mask).flatten(0, 1)
        loss = coverage_loss(logits[filled.flatten()], target[filled.flatten()])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient_norm([p for p in parts.parameters() if p.requires_grad], 2.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return [round(float(np.mean(losses[k : k + 25])), 4) for k in range(0, steps, 25)]
