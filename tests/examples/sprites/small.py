"""The model that tests of training make do with."""

from __future__ import annotations

import dataclasses

import numpy as np

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.presets import preset
from conceptmaster.examples.sprites.training.options import TrainOptions
from conceptmaster.examples.sprites.training.train_model import train_model
from conceptmaster.examples.sprites.world.scenes import PERIODS

CLIPS = 12
"""In a pool."""


def small_config(**concept: str) -> ModelConfig:
    """The preset ``sprites``, small, with other fields of its concept path."""
    config = preset("sprites")
    return dataclasses.replace(
        config,
        transformer=dataclasses.replace(config.transformer, num_attention_heads=6, num_layers=2, ffn_dim=96),
        concept=dataclasses.replace(config.concept, **concept),
        vae=config.vae | {"width": 8, "layers": 1},
    )


def how_it_runs(look):
    """``clip_arrays.patterns`` of one look, in NumPy."""
    angle, runs = look.angle, np.full(7, np.nan)
    if look.texture == "stripes":
        runs[:4] = np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)
    elif look.texture == "checks":
        runs[2:4] = np.cos(2 * angle), np.sin(2 * angle)
    elif look.texture == "dots":
        runs[4:6] = np.cos(4 * angle), np.sin(4 * angle)
    if look.texture != "plain":
        runs[6] = 2 * (look.period - PERIODS[0]) / (PERIODS[1] - PERIODS[0]) - 1
    return runs


def train_small(pool, output, open_data=None, config=None, **options):
    """Train the small model on a pool, on videos alone; ``options``: of ``TrainOptions``."""
    how = TrainOptions(**({"batch_size": 4, "log_every": 2} | options))
    train_model(config or small_config(), open_data or (lambda done: pool), pool, output, how)
