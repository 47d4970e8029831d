"""Teach the text encoder, with the story and scenery heads, to read captions of any words, before any video.

Cheap, and decisive: where captions tell the video no places, or no backgrounds, when joint training begins,
they go on telling none for long. An encoder that attends evenly at first stays on that plateau; one whose
heads begin by looking at a word's neighbours leaves it within a hundred steps.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from tqdm import tqdm

from conceptmaster.engine.encoders import TextEncoder
from conceptmaster.examples.sprites.training.attention import cheapest_attention
from conceptmaster.examples.sprites.training.learning import (
    MuonAdamW,
    autocast,
    check_norm,
    gradient_norm,
)
from conceptmaster.examples.sprites.training.train_captions import FAST_NAMES
from conceptmaster.examples.sprites.training.train_model import ADAM_NAMES

from ..world.scenes import Wish
from .artist import Artist
from .batches import Captions
from .trainee import MOTION_WEIGHT, Trainee

READ = 1 << 45
"""First seed of what is read here."""
DRAWN = 1600
"""Clips that tell what backgrounds look like."""
RATE, FAST_RATE = 0.012, 0.02
"""Of matrices, and of all else in an encoder that is fresh."""
WARM = 20
"""Steps in which they rise."""
KEPT = 0.1
"""Weight of how far embeddings move that are to stay, as a share of them."""
NEAR, AROUND, AWAY = 0.6, 0.3, 8.0
"""How much less, by the word, heads attend that look one way and both ways; and to what is the other way."""
MOST = 128
"""Distance from which on UMT5 does not tell distances apart."""


@torch.no_grad()
def look_near(encoder: TextEncoder) -> None:
    """Let a text encoder's heads begin by attending to near words: the first to those before, the second to
    those behind, the third to both, the others to all alike.

    Relative positions have buckets: half of them for words behind, in each half first every distance, then
    ever wider ranges.
    """
    for block in encoder.model.encoder.block:
        table = block.layer[0].SelfAttention.relative_attention_bias.weight  # [buckets,A]
        half = len(table) // 2
        exact = half // 2
        steps = torch.arange(half - exact) + 0.5
        wide = exact * (MOST / exact) ** (steps / (half - exact))
        distance = torch.cat([torch.arange(exact, dtype=torch.float32), wide])
        table.zero_()
        for head, slopes in enumerate(((NEAR, None), (None, NEAR), (AROUND, AROUND))[: table.shape[1]]):
            for side, slope in enumerate(slopes):
                rows = slice(side * half, (side + 1) * half)
                table[rows, head] = -AWAY if slope is None else -slope * distance
            table[0, head] = 0.0  # itself


def learn_to_read(
    trainee: Trainee, artist: Artist, steps: int, size: int, device: str, keep: bool
) -> dict[str, list[float]]:
    """Train on ``steps`` batches of ``size`` captions; returns the mean losses of every 25 steps, by head.

    ``keep``: the transformer has learned to read these embeddings, which are therefore to stay near what they
    are; what is asked for comes in beside it.
    """
    read = {
        "text": trainee.model.text_encoder,
        "embedder": trainee.model.transformer.condition_embedder.text_embedder,
    }
    heads = {"story": trainee.story, "scenery": trainee.scenery, "motion": trainee.motion}
    parts = nn.ModuleDict(read | heads)
    before = copy.deepcopy(nn.ModuleDict(read)).requires_grad_(False)
    table = artist.backgrounds(range(READ - DRAWN, READ), Wish(foreign=0.0))
    unknown = torch.stack(list(table.values())).mean(0)
    others = RATE / 4 if keep else FAST_RATE
    optimizer = MuonAdamW(parts.named_parameters(), RATE, others, adam_names=(*ADAM_NAMES, *FAST_NAMES))
    losses: dict[str, list[float]] = {"story": [], "scenery": [], "motion": [], "moved": []}
    for step in tqdm(range(steps), desc="read", disable=None):
        scenes = artist.scenes(range(READ + step * size, READ + (step + 1) * size), Wish(foreign=0.0))
        captions = Captions.of(artist.told_of(scenes)).to(device)
        wanted = torch.stack([table.get(scene.ground, unknown) for scene in scenes])
        optimizer.set_scale(min(1.0, (step + 1) / WARM, (steps - step) / (0.4 * steps)))
        with cheapest_attention(device), autocast(device):
            text = trainee.read(captions.token_ids, captions.token_mask)
            embedded = trainee.embedded(text)
            told = trainee.told_scenery(embedded, captions.token_mask).view_as(wanted)
            story, motion = trainee.reading(captions, text)
            found = {
                "story": story,
                "motion": motion,
                "scenery": (told - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean(),
                "moved": embedded.new_zeros(()),
            }
            if keep:
                old = before["text"](captions.token_ids, captions.token_mask)
                old = before["embedder"](old).float()
                shown = captions.token_mask[..., None]
                found["moved"] = ((embedded - old).square() * shown).sum() / (old.square() * shown).sum()
            loss = found["story"] + found["scenery"] + MOTION_WEIGHT * motion + KEPT * found["moved"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        check_norm(gradient_norm(parts.parameters(), 2.0))
        optimizer.step()
        for name, value in found.items():
            losses[name].append(float(value.detach()))
    return {
        name: [round(sum(part) / len(part), 4) for k in range(0, steps, 25) if (part := every[k : k + 25])]
        for name, every in losses.items()
    }
