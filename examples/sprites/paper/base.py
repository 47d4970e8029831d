"""The base of all rows: a transformer that was trained on captions alone, without any concept path.

Text encoder, picture encoder and VAE are given, as T5, CLIP and the VAE were to the paper; only the
transformer learns here. What it cannot read in a caption, how a concept looks, it makes up.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from conceptmaster.engine.checkpoints.safetensors_io import load_strict, save
from conceptmaster.engine.model import ConceptMaster

from ..training.attention import cheapest_attention
from ..training.learning import Average, MuonAdamW, autocast
from ..training.loop import LoopOptions, log_to, random_of, train
from ..training.noising import HELD_SIGMA, flow_loss, noised, normal, random_sigma
from ..training.train_model import ADAM_NAMES
from .pool import ClipPool, Clips
from .setting import paper_config

BATCH = 32
NO_CAPTION = 0.1
"""Share of clips whose caption is left out, for guidance."""


class Base(nn.Module):
    """The transformer of ``injection="none"`` beside the text encoder, which is given and stays as it is."""

    def __init__(self, text_encoder: dict[str, Tensor], channels: Tensor) -> None:
        super().__init__()
        self.channels = channels
        self.model = ConceptMaster(paper_config(injection="none"))
        load_strict(self.model.text_encoder, text_encoder)
        self.model.text_encoder.requires_grad_(False)

    def forward(self, clips: Clips, noise: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """The loss of clips at the levels ``sigma`` [B] of ``noise``, which is like their latents."""
        concept = self.model.config.concept
        with torch.no_grad():
            text = self.model.text_encoder(clips.token_ids, clips.token_mask)
        empty = noise.new_zeros(len(noise), concept.max_concepts, concept.tokens_per_concept, concept.width)
        unseen = torch.zeros(len(noise), concept.max_concepts, dtype=torch.bool)
        noisy = noised(clips.latents, noise, sigma)
        velocity = self.model.transformer(noisy, sigma * 1000.0, text, empty, unseen)
        known = clips.latents, noise, sigma, clips.coverage, HELD_SIGMA
        return {"total": flow_loss(velocity, *known, channels=self.channels)}


def train_base(
    text_encoder: dict[str, Tensor], channels: Tensor, pool: ClipPool, output: Path, steps: int, lr: float
) -> None:
    """Train to ``steps`` and write ``transformer.safetensors``; goes on from ``training.safetensors``.
    channels: what an error of each latent channel counts for, [Cz]."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    base = Base(text_encoder, channels)
    transformer = base.model.transformer
    optimizer = MuonAdamW(transformer.named_parameters(), lr, lr / 8, adam_names=ADAM_NAMES)
    order = pool.order(0, steps, BATCH)

    def losses_of(step: int) -> dict[str, Tensor]:
        rng = random_of(0, step)
        silent = rng.random(BATCH) < NO_CAPTION
        clips = pool.batch(order[step]).without_captions(silent, pool.no_caption)
        noise = normal(rng, tuple(clips.latents.shape), "cpu")
        sigma = random_sigma(rng, BATCH)
        with cheapest_attention("cpu"), autocast("cpu"):
            return base(clips, noise, sigma)

    def publish(steps: int) -> dict[str, float]:
        save(output / "transformer.safetensors", transformer.state_dict())
        return {}

    train(
        transformer,
        optimizer,
        losses_of,
        LoopOptions("base", steps, log_every=50, save_every=250),
        log=log_to(output / "log.jsonl"),
        average=Average(transformer, 0.995),
        checkpoint=output / "training.safetensors",
        publish=publish,
    )
