"""Training data on disk: shards of drawn clips, and the same clips as latents once the VAE is trained.

A shard is a folder of plain ``.npy`` arrays that are mapped, not loaded. It appears under its final name only
when it is whole, so drawing, encoding and training may run beside each other and be stopped at any moment.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..world.decoys import decoy, foreign
from ..world.draw import draw_clip, draw_reference
from ..world.scenes import FRAMES, MAX_CONCEPTS, SIZE, random_scene

SHARD = 500
"""Clips in a shard."""
REFERENCES = 2
"""Reference pictures drawn for each concept; training picks one of them at random."""
LATENT_GRID = (5, 8, 8)
CLIPS = ("video", "decoys")
LATENTS = ("latents.npy", "decoy-latents.npy")
"""A shard's clips and its decoys, and what the latents of each are called."""


@dataclass(frozen=True)
class Shard:
    """One mapped shard: ``video`` and ``decoys`` [n, F, H, W, 3], ``references`` [n, N, R, H, W, 3],
    ``foreign`` [n, N, H, W, 3] (see ``decoys.py``), ``coverage`` [n, N, 5, 8, 8], all uint8."""

    folder: Path
    video: np.ndarray
    decoys: np.ndarray
    references: np.ndarray
    foreign: np.ndarray
    coverage: np.ndarray
    captions: list[str]
    labels: list[list[str]]


def _coverage(masks: np.ndarray) -> np.ndarray:
    """How much of every latent cell a concept covers: float [N, F, H, W] -> uint8 [N, 5, 8, 8]."""
    n, f, h, w = masks.shape
    rows, columns = LATENT_GRID[1:]
    cells = masks.reshape(n, f, rows, h // rows, columns, w // columns).mean((3, 5))
    first, rest = cells[:, :1], cells[:, 1:].reshape(n, LATENT_GRID[0] - 1, -1, *LATENT_GRID[1:]).mean(2)
    return np.round(np.concatenate([first, rest], axis=1) * 255).astype(np.uint8)


def draw_shard(folder: Path, index: int, held_out: bool = False) -> Path:
    """Draw shard ``index`` unless it is there; returns its folder.

    ``held_out`` takes the looks kept for judging.
    """
    target = folder / f"shard-{index:05d}"
    if target.exists():
        return target
    partial = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arrays: dict[str, np.ndarray] = {
        name: np.zeros((SHARD, FRAMES, SIZE, SIZE, 3), np.uint8) for name in CLIPS
    }
    references = np.zeros((SHARD, MAX_CONCEPTS, REFERENCES, SIZE, SIZE, 3), np.uint8)
    strangers = np.zeros((SHARD, MAX_CONCEPTS, SIZE, SIZE, 3), np.uint8)
    coverage = np.zeros((SHARD, MAX_CONCEPTS, *LATENT_GRID), np.uint8)
    captions, labels = [], []
    for k in range(SHARD):
        seed = index * SHARD + k
        scene = random_scene(seed, held_out=held_out)
        rng = np.random.Generator(np.random.Philox(key=[seed, 11]))
        other = np.random.Generator(np.random.Philox(key=[seed, 13]))
        arrays["video"][k], masks = draw_clip(scene)
        arrays["decoys"][k] = draw_clip(decoy(scene, other))[0]
        coverage[k, : len(scene.actors)] = _coverage(masks)
        for n, actor in enumerate(scene.actors):
            for r in range(REFERENCES):
                references[k, n, r] = draw_reference(actor, rng)
            strangers[k, n] = draw_reference(foreign(actor, other), other)
        captions.append(scene.caption)
        labels.append([actor.label for actor in scene.actors])
    arrays |= {"references": references, "foreign": strangers, "coverage": coverage}
    for name, array in arrays.items():
        np.save(partial / f"{name}.npy", array)
    (partial / "text.json").write_text(json.dumps({"captions": captions, "labels": labels}))
    partial.rename(target)
    return target


def open_shard(folder: Path) -> Shard:
    """Map a whole shard."""
    text = json.loads((folder / "text.json").read_text())
    names = ("video", "decoys", "references", "foreign", "coverage")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    return Shard(folder, captions=text["captions"], labels=text["labels"], **arrays)


def shards(folder: Path) -> list[Path]:
    """The whole shards of a pool, in order."""
    return sorted(folder.glob("shard-*"))


def encode_shard(folder: Path, encode: Callable[[np.ndarray], np.ndarray], batch: int = 10) -> None:
    """Write the latents of a shard's clips and decoys beside them (``LATENTS``), unless they are there:
    ``encode`` takes uint8 [b, F, H, W, 3] to latents."""
    shard = open_shard(folder)
    for clips, name in zip((shard.video, shard.decoys), LATENTS, strict=True):
        if (folder / name).exists():
            continue
        parts = [encode(np.asarray(clips[i : i + batch])) for i in range(0, len(clips), batch)]
        partial = folder / f".{name}.tmp.npy"
        np.save(partial, np.concatenate(parts).astype(np.float16))
        partial.rename(folder / name)
