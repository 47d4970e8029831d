"""The model and the pool that tests of training make do with."""

from __future__ import annotations

import dataclasses

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.presets import preset
from conceptmaster.examples.sprites.training.train_model import train_model

CLIPS = 6
"""In a shard."""


def small_config(**concept: str) -> ModelConfig:
    """The preset ``sprites``, small, with other fields of its concept path."""
    config = preset("sprites")
    return dataclasses.replace(
        config,
        transformer=dataclasses.replace(config.transformer, num_attention_heads=6, num_layers=2, ffn_dim=96),
        concept=dataclasses.replace(config.concept, **concept),
        vae=config.vae | {"width": 8, "layers": 1},
    )


def train_small(folder, output, tokenizer, **how):
    """Train the small model on the pool in ``folder``, on videos alone; ``how``: as ``train_model`` takes."""
    config = how.pop("config", small_config())
    usual = {"batch_size": 4, "picture_steps": 0, "caption_steps": 0, "log_every": 2}
    train_model(config, folder, folder, output, tokenizer, **(usual | how))
