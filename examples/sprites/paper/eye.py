"""The picture encoder of all rows: the shipped model's, whose class token is taught what CLIP's knows.

The shipped model reads the patches alone, so nothing ever asked its class token for anything. IP-Adapter
reads that token and no other. Here two pictures of one concept are told from those of others by it, as
CLIP's pictures are by their captions (InfoNCE, van den Oord et al., 2018), while the patches are held to what
they were.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptmaster.engine.checkpoints.safetensors_io import load_strict, save
from conceptmaster.engine.encoders import ImageEncoder

from ..training.attention import cheapest_attention
from ..training.batches import for_clip, generator
from ..training.clip_arrays import cast_of, in_parts
from ..training.learning import MuonAdamW, autocast
from ..training.loop import LoopOptions, log_to, random_of, train
from ..training.train_model import ADAM_NAMES
from ..world.paint_many import draw_references
from ..world.scenes import NOUNS, Actor, random_identity
from .setting import paper_config

CONCEPTS = 64
"""In a step, two pictures of each."""
HOLD = 1.0
"""Weight of the patches' squared difference to what they were, relative to their size."""


def two_pictures(rng: np.random.Generator, count: int, held_out: bool = False) -> Tensor:
    """Two pictures each of so many concepts, CLIP-normalised, [2,count,3,px,px]."""
    looks = [random_identity(rng, held_out) for _ in range(count)]
    nouns = [str(noun) for noun in rng.choice(NOUNS, count)]
    actors = [
        Actor(n, n, look, 1.0, (0.0, 0.0), (1, 1), "still") for n, look in zip(nouns, looks, strict=True)
    ]
    cast, g = cast_of(actors), generator(rng, "cpu")
    return for_clip(torch.stack([in_parts(draw_references, cast, g) for _ in range(2)]))


class Eye(nn.Module):
    """A picture encoder that learns, beside the one that it was."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        super().__init__()
        config = paper_config().image_encoder
        self.encoder, self.before = ImageEncoder(config), ImageEncoder(config).requires_grad_(False)
        for encoder in (self.encoder, self.before):
            load_strict(encoder, given)
        self.scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Losses of two pictures each of B concepts, [2,B,3,px,px]; ``right``: how often the other picture is
        the nearest of all, no gradient."""
        flat = pictures.flatten(0, 1)
        tower = self.encoder.model.vision_model
        states = tower.post_layernorm(tower(pixel_values=flat).last_hidden_state)  # [2B,1+P,hidden]
        told = self.encoder.model.visual_projection(states).float()  # [2B,1+P,Dp]
        first, second = F.normalize(told[:, 0], dim=-1).chunk(2)
        logits = first @ second.T * self.scale.exp()
        own = torch.arange(len(logits))
        named = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        with torch.no_grad():
            before = self.before(flat).float()
        held = (told[:, 1:] - before).square().mean() / before.square().mean()
        right = (logits.argmax(1) == own).float().mean()
        return {"total": named + HOLD * held, "named": named, "held": held, "right": right}


def train_eye(given: dict[str, Tensor], output: Path, steps: int = 400, lr: float = 0.004) -> None:
    """Train to ``steps`` and write ``image_encoder.safetensors``; goes on from ``eye.safetensors``."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    eye = Eye(given)
    optimizer = MuonAdamW(eye.named_parameters(), lr, lr / 8, adam_names=ADAM_NAMES)

    def losses(pictures: Tensor) -> dict[str, Tensor]:
        with cheapest_attention("cpu"), autocast("cpu"):
            return eye(pictures)

    @torch.no_grad()
    def judged(steps: int) -> dict[str, float]:
        save(output / "image_encoder.safetensors", eye.encoder.state_dict())
        found = losses(two_pictures(np.random.default_rng(0), 256, held_out=True))
        return {f"held_out_{name}": round(float(value), 4) for name, value in found.items()}

    train(
        eye,
        optimizer,
        lambda step: losses(two_pictures(random_of(1, step), CONCEPTS)),
        LoopOptions("eye", steps, log_every=25, save_every=100),
        log=log_to(output / "eye-log.jsonl"),
        checkpoint=output / "eye.safetensors",
        publish=judged,
    )
