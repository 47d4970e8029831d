"""The model and the pool that tests of training make do with."""

from __future__ import annotations

import dataclasses

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.presets import preset

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
