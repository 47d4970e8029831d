"""Teach the story head, then with it the text encoder and DAM, to read captions of any words, before any video.

Cheap, and decisive for the sprites: where captions tell the video no places when joint training begins, they
go on telling none for long.
"""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from conceptmaster.examples.sprites.attention import cheapest_attention
from conceptmaster.examples.sprites.learning import MuonAdamW, autocast, gradient_norm
from conceptmaster.examples.sprites.train_captions import FAST_NAMES
from conceptmaster.examples.sprites.train_model import ADAM_NAMES

from ..world.scenes import Wish
from .batches import Artist
from .trainee import Trainee

READ = 1 << 45
"""First seed of what is read here."""
ALONE = 0.2
"""Share of the steps in which the story head learns alone."""
RATES = 0.008, 0.004
"""Of matrices, and of all else, the text encoder's too; the head's are ``HEAD`` times as high."""
HEAD = 3.0


def learn_to_read(trainee: Trainee, artist: Artist, steps: int, size: int, device: str) -> list[float]:
    """Train on ``steps`` batches of ``size`` captions; returns the mean losses of every 25 steps."""
    model = trainee.model
    text = nn.ModuleDict({"text": model.text_encoder, "dam": model.dam})
    lr, adam = RATES
    names = ("bias", *ADAM_NAMES, *FAST_NAMES)
    optimizers = [
        MuonAdamW(trainee.story.named_parameters(), HEAD * lr, HEAD * adam),
        MuonAdamW(text.named_parameters(), lr, adam, adam_names=names),
    ]
    torch.manual_seed(0)
    losses: list[float] = []
    for step in tqdm(range(steps), desc="read", disable=None):
        captions = artist.captions(range(READ + step * size, READ + (step + 1) * size), Wish(foreign=0.0))
        alone = step < ALONE * steps
        used = optimizers[:1] if alone else optimizers
        scale = 1.0 if alone else min(1.0, (steps - step) / (0.4 * steps))
        with cheapest_attention(device), autocast(device):
            loss = trainee.reading(captions)
        trainee.zero_grad(set_to_none=True)
        loss.backward()
        gradient_norm([*trainee.story.parameters(), *text.parameters()], 2.0)
        for optimizer in used:
            optimizer.set_scale(scale)
            optimizer.step()
        losses.append(float(loss.detach()))
    trainee.zero_grad(set_to_none=True)
    return [round(sum(part) / len(part), 4) for k in range(0, steps, 25) if (part := losses[k : k + 25])]
