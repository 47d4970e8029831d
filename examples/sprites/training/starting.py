"""From the weights of one model to the beginning of another's training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from conceptmaster.engine.checkpoints.safetensors_io import load, load_strict
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.model import ConceptMaster


def start_from(model: ConceptMaster, weights: Path) -> list[str]:
    """Take over the weights of a trained model, but for tensors that have another shape; returns the names of
    what stays fresh. With more latent channels than it had, the layers next to them take no notice of the new
    ones at first, and tell their mean. Keys and values of concepts that start as the text's are then those of
    the weights."""
    old, own = load(weights)[0], model.state_dict()
    _add_channels(old, model.config)
    taken = {name: old[name] for name in own if name in old and old[name].shape == own[name].shape}
    # Tied weights are stored under one of their names; the other must not come back with fresh values.
    tied = {own[name].data_ptr() for name in taken}
    fresh = {name: own[name] for name in own if name not in taken and own[name].data_ptr() not in tied}
    load_strict(model, taken | fresh)
    if any("add_k_proj" in name for name in fresh):
        for transformer in model.experts().values():
            transformer.start_from_text()
    return sorted(fresh)


def _add_channels(tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Give the transformer's first and last layer as many latent channels as ``config`` has."""
    c = config.transformer
    first, last = "transformer.patch_embedding.weight", "transformer.proj_out"
    if first not in tensors:
        return
    before = tensors[first].shape[1] - c.position_channels
    more = c.in_channels - before
    if more <= 0:
        return
    latents, positions = tensors[first].split([before, c.position_channels], dim=1)
    new = latents.new_zeros(latents.shape[0], more, *latents.shape[2:])
    tensors[first] = torch.cat([latents, new, positions], dim=1)
    for name in (f"{last}.weight", f"{last}.bias"):  # [patch*Cz,...]
        parts = tensors[name].unflatten(0, (-1, before))
        new = parts.new_zeros(len(parts), more, *parts.shape[2:])
        tensors[name] = torch.cat([parts, new], dim=1).flatten(0, 1)
