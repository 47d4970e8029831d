"""Teach the picture encoder and the Q-Former to see, on reference pictures alone.

Cheap beside the videos, and their condition: what the visual queries do not tell of a picture no video can
show. A training-only head redraws the picture upright, every query its own square.
"""

from __future__ import annotations

from torch import Tensor, nn
from tqdm import tqdm

from conceptmaster.examples.sprites.training.attention import cheapest_attention
from conceptmaster.examples.sprites.training.learning import (
    MuonAdamW,
    autocast,
    check_norm,
    gradient_norm,
)
from conceptmaster.examples.sprites.training.train_model import ADAM_NAMES

from .artist import Artist
from .trainee import Trainee

SEEN = 1 << 43
"""First seed of the pictures that are seen here."""
PICTURES = 128
"""Pictures of a step."""
RATE = 0.012
"""Muon's learning rate; AdamW takes an eighth of it."""


def portrait_loss(trainee: Trainee, pixels: Tensor, portraits: Tensor) -> Tensor:
    """How far what the visual queries of pictures [M,3,px,px] redraw is from ``portraits`` [M,3,32,32]."""
    visual = trainee.model.qformer(trainee.model.image_encoder(pixels))
    difference = trainee.portrait(visual.float()) - portraits
    return difference.abs().mean() + difference.square().mean()


def learn_to_see(trainee: Trainee, artist: Artist, steps: int, device: str) -> list[float]:
    """Train on ``steps`` batches of pictures; returns the mean losses of every 25 steps."""
    model = trainee.model
    parts = nn.ModuleDict(
        {"image_encoder": model.image_encoder, "qformer": model.qformer, "portrait": trainee.portrait}
    )
    optimizer = MuonAdamW(parts.named_parameters(), RATE, RATE / 8, adam_names=ADAM_NAMES)
    losses: list[float] = []
    for step in tqdm(range(steps), desc="see", disable=None):
        optimizer.set_scale(min(1.0, (steps - step) / (0.4 * steps)))
        pixels, portraits = artist.pictures(SEEN + step, PICTURES)
        with cheapest_attention(device), autocast(device):
            loss = portrait_loss(trainee, pixels, portraits)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        check_norm(gradient_norm(parts.parameters(), 2.0))
        optimizer.step()
        losses.append(float(loss.detach()))
    return [round(sum(part) / len(part), 4) for k in range(0, steps, 25) if (part := losses[k : k + 25])]
