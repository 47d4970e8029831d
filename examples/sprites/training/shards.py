"""Training data on disk: shards of drawn clips, and the same clips as latents once the VAE is trained.

A shard is a folder of plain ``.npy`` arrays that are mapped, not loaded. It appears under its final name only
when it is whole, so drawing, encoding and training may run beside each other and be stopped at any moment.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from conceptmaster.engine.presets import preset
from conceptmaster.runtime.atomic_write import replacing

from ..world.draw import paint_background
from ..world.scene_arrays import scene_arrays, tokenised
from ..world.scenes import BACKGROUNDS
from .clip_arrays import CLIPS, TEXTS, draw_block

SHARD = 500
"""Clips in a shard."""
VIDEOS = {"latents": "video", "decoys": "decoy-video"}
"""What the clips are called that latents are of, uint8 [n,F,H,W,3]."""
ARRAYS = (*CLIPS, *TEXTS, "coverage", "references", "foreign", "portraits", "traits", "patterns")
"""What an encoded shard has of its clips, as ``Pool`` names it."""


def draw_shard(pool: Path, index: int, held_out: bool = False) -> Path:
    """Draw shard ``index`` of a pool unless it is there: ``VIDEOS``, and all of ``ARRAYS`` but the latents.
    Returns its folder. ``held_out`` takes the looks kept for judging."""
    target = pool / f"shard-{index:05d}"
    if target.exists():
        return target
    partial = pool / f".{target.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config, first = preset("sprites"), index * SHARD
    tokens = config.text_tokens, config.concept.label_tokens
    scenes = tokenised(scene_arrays(first, SHARD, held_out), *tokens)
    ground = [
        paint_background(list(BACKGROUNDS)[kind], np.random.Generator(np.random.Philox(key=[first + k, 7])))
        for k, kind in enumerate(scenes["background"])
    ]
    tensors = {name: torch.from_numpy(value) for name, value in scenes.items()}
    g = torch.Generator().manual_seed(2 * index + held_out)
    for name, array in draw_block(tensors, torch.from_numpy(np.stack(ground)), g).items():
        np.save(partial / f"{VIDEOS.get(name, name)}.npy", array)
    partial.rename(target)
    return target


def open_array(folder: Path, name: str) -> np.ndarray:
    """One of a shard's arrays, mapped."""
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def shard_folders(pool: Path) -> list[Path]:
    """The whole shards of a pool, in order."""
    return sorted(pool.glob("shard-*"))


def encode_shard(folder: Path, encode: Callable[[np.ndarray], np.ndarray], batch: int = 10) -> None:
    """Write the latents of a shard's clips and decoys beside them, unless they are there: ``encode`` takes
    uint8 [b, F, H, W, 3] to latents."""
    for name, clips in VIDEOS.items():
        if not (folder / f"{name}.npy").exists():
            video = open_array(folder, clips)
            parts = [encode(np.asarray(video[i : i + batch])) for i in range(0, len(video), batch)]
            with replacing(folder / f"{name}.npy") as partial:
                np.save(partial, np.concatenate(parts).astype(np.float16))


def is_encoded(folder: Path) -> bool:
    """Whether a shard has all that training reads."""
    return all((folder / f"{name}.npy").exists() for name in ARRAYS)
