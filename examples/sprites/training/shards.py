"""Training data on disk: shards of drawn clips, and the same clips as latents once the VAE is trained.

A shard is a folder of plain ``.npy`` arrays that are mapped, not loaded. It appears under its final name only
when it is whole, so drawing, encoding and training may run beside each other and be stopped at any moment.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..world.decoys import decoy, foreign
from ..world.draw import draw_clip, draw_reference
from ..world.scenes import FRAMES, MAX_CONCEPTS, SIZE, random_scene
from .looks import PORTRAIT, RUNS, cast_of, told_of

SHARD = 500
"""Clips in a shard."""
REFERENCES = 2
"""Reference pictures drawn for each concept; training picks one of them at random."""
LATENT_GRID = (5, 8, 8)
CLIPS = {"video": "latents", "decoys": "decoy-latents"}
"""A shard's clips and its decoys, and what the latents of each are called."""
TOLD = {"portraits": f"portraits-{PORTRAIT}", "traits": "traits", "patterns": "patterns"}
"""What ``looks.told_of`` says of a shard's concepts, and what the files of it are called."""


def coverage(visible: Tensor) -> Tensor:
    """How much of every latent cell a concept covers: float [B,N,F,S,S] -> uint8 [B,N,5,8,8]."""
    later, rows, columns = LATENT_GRID[0] - 1, *LATENT_GRID[1:]
    cells = visible.unflatten(4, (columns, -1)).unflatten(3, (rows, -1)).mean((4, 6))  # [B,N,F,8,8]
    rest = cells[:, :, 1:].unflatten(2, (later, -1)).mean(3)
    return (torch.cat((cells[:, :, :1], rest), dim=2) * 255).round().to(torch.uint8)


def draw_shard(folder: Path, index: int, held_out: bool = False) -> Path:
    """Draw shard ``index`` unless it is there; returns its folder.

    ``video`` and ``decoys`` [n,F,H,W,3], ``references`` [n,N,R,H,W,3], ``foreign`` [n,N,H,W,3] (see
    ``decoys.py``) and ``coverage`` [n,N,5,8,8] are uint8. ``held_out`` takes the looks kept for judging.
    """
    target = folder / f"shard-{index:05d}"
    if target.exists():
        return target
    partial = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shapes = {name: (FRAMES, SIZE, SIZE, 3) for name in CLIPS} | {
        "references": (MAX_CONCEPTS, REFERENCES, SIZE, SIZE, 3),
        "foreign": (MAX_CONCEPTS, SIZE, SIZE, 3),
        "coverage": (MAX_CONCEPTS, *LATENT_GRID),
    }
    arrays = {name: np.zeros((SHARD, *shape), np.uint8) for name, shape in shapes.items()}
    captions, labels = [], []
    for k in range(SHARD):
        seed = index * SHARD + k
        scene = random_scene(seed, held_out=held_out)
        rng = np.random.Generator(np.random.Philox(key=[seed, 11]))
        other = np.random.Generator(np.random.Philox(key=[seed, 13]))
        arrays["video"][k], masks = draw_clip(scene)
        arrays["decoys"][k] = draw_clip(decoy(scene, other))[0]
        arrays["coverage"][k, : len(scene.actors)] = coverage(torch.from_numpy(masks)[None])[0].numpy()
        for n, actor in enumerate(scene.actors):
            for r in range(REFERENCES):
                arrays["references"][k, n, r] = draw_reference(actor, rng)
            arrays["foreign"][k, n] = draw_reference(foreign(actor, other), other)
        captions.append(scene.caption)
        labels.append([actor.label for actor in scene.actors])
    for name, array in arrays.items():
        np.save(partial / f"{name}.npy", array)
    (partial / "text.json").write_text(json.dumps({"captions": captions, "labels": labels}))
    partial.rename(target)
    return target


def open_array(folder: Path, name: str) -> np.ndarray:
    """One of a shard's arrays, mapped: those of ``draw_shard``, and what ``CLIPS`` and ``TOLD`` name."""
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def shard_folders(pool: Path) -> list[Path]:
    """The whole shards of a pool, in order."""
    return sorted(pool.glob("shard-*"))


def encode_shard(folder: Path, encode: Callable[[np.ndarray], np.ndarray], batch: int = 10) -> None:
    """Write the latents of a shard's clips and decoys beside them, unless they are there: ``encode`` takes
    uint8 [b, F, H, W, 3] to latents."""
    for clips, latents in CLIPS.items():
        if not (folder / f"{latents}.npy").exists():
            video = open_array(folder, clips)
            parts = [encode(np.asarray(video[i : i + batch])) for i in range(0, len(video), batch)]
            _save(folder, latents, np.concatenate(parts).astype(np.float16))


def tell_shard(folder: Path, first_seed: int, held_out: bool = False) -> None:
    """Write what ``looks.told_of`` says of a shard's concepts beside it, unless it is there: uint8
    [n,N,32,32,3] and [n,N,3], float32 [n,N,RUNS]."""
    if all((folder / f"{name}.npy").exists() for name in TOLD.values()):
        return
    labels = json.loads((folder / "text.json").read_text())["labels"]
    seeds = range(first_seed, first_seed + len(labels))
    actors = [actor for seed in seeds for actor in random_scene(seed, held_out=held_out).actors]
    filled = np.arange(MAX_CONCEPTS) < np.array([len(each) for each in labels])[:, None]  # [n,N]
    empty = {"portraits": np.full((*filled.shape, PORTRAIT, PORTRAIT, 3), 128, np.uint8)}
    empty |= {"traits": np.zeros((*filled.shape, 3), np.uint8)}
    empty |= {"patterns": np.full((*filled.shape, RUNS), np.nan, np.float32)}
    for name, told in told_of(cast_of(actors)).items():
        empty[name][filled] = told
        _save(folder, TOLD[name], empty[name])


def _save(folder: Path, name: str, array: np.ndarray) -> None:
    """Write an array of a shard, whole or not at all."""
    partial = folder / f".{name}.tmp.npy"
    np.save(partial, array)
    partial.rename(folder / f"{name}.npy")


def is_encoded(folder: Path) -> bool:
    """Whether a shard has all that training reads beside its clips."""
    return all((folder / f"{name}.npy").exists() for name in (*CLIPS.values(), *TOLD.values()))
