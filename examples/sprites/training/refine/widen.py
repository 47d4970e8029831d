"""Make a trained transformer twice as wide without changing what it computes (Net2Net, arXiv 1511.05641).

Every channel gets a twin: what writes a channel is written twice, what reads it reads half from each. Where
both sides are doubled, random numbers are added to the weights of one twin and subtracted from those of the
other: they cancel while twins are equal, and make their gradients differ, so that training parts them.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch
from torch import Tensor

from conceptmaster.engine.checkpoints.safetensors_io import load_model, load_strict, save_model
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.errors import InputError, WeightsError

CHUNKS = {"condition_embedder.time_proj": 6}
"""Layers whose output is several vectors of the width, one behind the other: how many."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``widen``."""
    parser.add_argument("--weights", required=True, type=Path, help="weights folder of a trained model")
    parser.add_argument("--output", required=True, type=Path, help="folder for the wider weights")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Write a weights folder; returns 0. Raises InputError where there is nothing to widen."""
    try:
        model = load_model(args.weights / "model.safetensors")
        shutil.copytree(args.weights, args.output, dirs_exist_ok=True)
    except (OSError, WeightsError) as error:
        raise InputError(f"cannot widen {args.weights}: {error}") from error
    save_model(widened(model, args.seed), args.output / "model.safetensors")
    print(f"weights: {args.output}")
    return 0


def widened(model: ConceptMaster, seed: int = 0) -> ConceptMaster:
    """The same function with twice the heads, width and feed-forward width."""
    old = model.config.transformer
    transformer = dataclasses.replace(
        old, num_attention_heads=2 * old.num_attention_heads, ffn_dim=2 * old.ffn_dim
    )
    wide = ConceptMaster(dataclasses.replace(model.config, transformer=transformer))
    generator = torch.Generator().manual_seed(seed)
    state, sizes = model.state_dict(), {name: tensor.shape for name, tensor in wide.state_dict().items()}
    load_strict(wide, {name: _doubled(name, state[name], sizes[name], generator) for name in state})
    return wide


def _doubled(name: str, old: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    out, chunks = old, next((n for part, n in CHUNKS.items() if part in name), 1)
    for axis, (before, after) in enumerate(zip(old.shape, shape, strict=True)):
        if before == after:
            continue
        if axis == 0 or old.ndim == 3:  # 3: tables [1,6,D], which write, but along their last axis
            parts = out.unflatten(axis, (chunks, -1))
            out = torch.cat([parts, parts], dim=axis + 1).flatten(axis, axis + 1)
        else:
            halves = torch.randn(out.shape, generator=generator) * old.std() / 2
            out = torch.cat([out / 2 + halves, out / 2 - halves], dim=axis)
    return out
