"""What a training can be begun from: the folder of another, or a packed checkpoint.

A packed checkpoint is small enough to be kept in a repository: eight bits a weight, files of 16 MiB at most.

Every row of a matrix is rounded to whole multiples of its own step, 1/127 of its largest value; vectors stay
bfloat16. A training that starts from it begins with that rounding, a hundred times finer than what it does to
the weights in a few steps.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from conceptmaster.engine.checkpoints.safetensors_io import load, save
from conceptmaster.errors import InputError
from conceptmaster.runtime.atomic_folder import replacing_folder

HEADS = "heads.safetensors"
"""The file of the heads that only training needs."""
LARGEST = 16 * 2**20
"""Bytes of tensors in a file, with room for the header."""
STEP = ".step"
"""What the name of a matrix's steps ends with."""


def state_of(folder: Path) -> dict[str, Tensor]:
    """The weights of a model (``model.…``) and of its heads, of the folder of a training or of a packed
    checkpoint. Raises InputError where there are none."""
    if (folder / "weights-1.safetensors").exists():
        return unpack(folder)
    path = folder / "model.safetensors"
    if not path.exists():
        raise InputError(
            f"{path} is missing: a training starts from a folder that `train` or `pack` has filled"
        )
    state = {f"model.{name}": value for name, value in load(path)[0].items()}
    return state | (load(folder / HEADS)[0] if (folder / HEADS).exists() else {})


def pack_folder(folder: Path, output: Path, *, overwrite: bool = False) -> list[Path]:
    """Write a packed checkpoint of a training's averaged weights, whole or not at all; returns the paths of
    all its files, none of more than 16 MiB.

    Its VAE is bfloat16. Raises InputError where there is nothing to pack, and where the folder ``output``
    holds files, but for a packed checkpoint that ``overwrite`` replaces.
    """
    state = state_of(folder)
    vae = {name: value.to(torch.bfloat16) for name, value in load(folder / "vae.safetensors")[0].items()}
    with replacing_folder(output, _packed_files, replace=overwrite) as new:
        pack(state, new)
        for name in ("vae.json", "tokenizer.json"):
            shutil.copyfile(folder / name, new / name)
        save(new / "vae.safetensors", vae)
    return [output / name for name in _packed_files(output)]


def _packed_files(folder: Path) -> list[str]:
    """Of a packed checkpoint's."""
    weights = sorted(path.name for path in folder.glob("weights-*.safetensors"))
    return [*("vae.json", "tokenizer.json", "vae.safetensors"), *weights]


def pack(state: dict[str, Tensor], folder: Path) -> list[Path]:
    """Write a state dict as ``weights-1.safetensors``, ``weights-2.safetensors`` … in ``folder``; returns the
    paths."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        packed = _packed(name, value)
        more = sum(t.numel() * t.element_size() for t in packed.values())
        if parts[-1] and size + more > LARGEST - 2**18:
            parts.append({})
            size = 0
        parts[-1] |= packed
        size += more
    paths = [folder / f"weights-{number}.safetensors" for number in range(1, len(parts) + 1)]
    for path, part in zip(paths, parts, strict=True):
        save(path, part)
    return paths


def unpack(folder: Path) -> dict[str, Tensor]:
    """The state dict, float32, that ``pack`` wrote."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        tensors |= load(path)[0]
    state = {}
    for name, value in tensors.items():
        if name.endswith(STEP):
            continue
        if value.dtype == torch.int8:
            step = tensors[name + STEP].float()
            value = value.float() * step.view(-1, *[1] * (value.ndim - 1))
        state[name] = value.float()
    return state


def _packed(name: str, value: Tensor) -> dict[str, Tensor]:
    if value.ndim < 2 or not value.dtype.is_floating_point:
        return {name: value.to(torch.bfloat16) if value.dtype.is_floating_point else value.clone()}
    rows = value.float().flatten(1)
    step = (rows.abs().amax(1).clamp(min=1e-12) / 127).to(torch.bfloat16)
    whole = (rows / step.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {name: whole.view(value.shape), name + STEP: step}
