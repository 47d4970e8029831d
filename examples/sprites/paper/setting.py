"""The small model that the paper's rows share, and what is given to all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.presets import preset
from conceptmaster.engine.rivals import like
from conceptmaster.engine.vae.block_vae import BlockVAE

from ..world.scenes import MAX_CONCEPTS
from .rows import Row

QUERIES = 16
"""Tokens that a concept brings, of every row whose mechanism does not say otherwise."""
CHANNELS = 48
"""Of a latent. The judge finds every true video right when only these are kept (`paper --truth`)."""


def row_config(row: Row) -> ModelConfig:
    """A row's model."""
    config = paper_config() if row.system is None else like(paper_config(), row.system)
    return dataclasses.replace(config, concept=dataclasses.replace(config.concept, **row.concept))


def paper_config(**concept: Any) -> ModelConfig:
    """Our model, but for some fields of ConceptConfig; ``injection="none"`` is the base's."""
    config = preset("sprites")
    ours = dataclasses.replace(config.concept, max_concepts=MAX_CONCEPTS, queries=QUERIES)
    vae = {
        "z_dim": CHANNELS,
        "width": 64,
        "layers": 4,
        "latents_mean": [0.0] * CHANNELS,
        "latents_std": [0.5] * CHANNELS,
    }
    return dataclasses.replace(
        config,
        transformer=dataclasses.replace(
            config.transformer,
            num_attention_heads=6,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            ffn_dim=576,
            num_layers=4,
        ),
        concept=dataclasses.replace(ours, **concept),
        vae=config.vae | vae,
    )


def pixel_weights(vae: BlockVAE) -> Tensor:
    """What an error of each latent channel counts for in pixels, [Cz], one on average: the VAE's components
    are orthonormal, each multiplied by its scale. Colours are a tenth of the latents' variance where concepts
    are, and nearly half of the pixels'."""
    weights = vae.scale.detach() ** -2
    return weights / weights.mean()
