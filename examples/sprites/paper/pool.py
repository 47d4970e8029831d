"""The clips that base and rows learn from: drawn once, from one seed, and kept on disk.

Every row meets the same clips, and nothing is drawn twice. An array is a file that is mapped, not read, so
that several trainings share its pages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.vae.block_vae import BlockVAE

from ..scoring.reports import write_json
from ..training.batches import Tensors, for_clip
from ..training.clip_arrays import coverage, in_parts, looks_of
from ..training.train_vae import from_bytes
from ..world.draw import paint_background
from ..world.paint_many import draw_clips, draw_references, filled
from ..world.scene_arrays import Arrays, arrays_of, tokenised
from ..world.scenes import Scene, random_scene
from ..world.vocabulary import build_tokenizer, tokenise

CLIPS = 16_384
"""In the pool: as many as a row has samples, so that a row meets each once."""
PART = 64
"""Clips that are drawn together; a pool that was stopped goes on behind its last whole part."""
FIRST_SEED = 2**24
"""Of the pool's scenes: far from the seeds of those that are judged."""
KEPT = (
    "count",
    "token_ids",
    "token_mask",
    "label_ids",
    "label_mask",
    "path",
    "latents",
    "coverage",
    "pictures",
)


@dataclass
class Clips(Tensors):
    """A batch of clips, N slots of which the first ``count`` are filled.

    count int64 [B], token_ids and token_mask [B,T], label_ids and label_mask [B,N,L], path [B,N,F,2] in
    pixels, latents (normalised) [B,Cz,F,H,W], coverage [B,N,F,H,W] in 0..1, pictures
    (CLIP-normalised) [B,N,3,px,px].
    """

    count: Tensor
    token_ids: Tensor
    token_mask: Tensor
    label_ids: Tensor
    label_mask: Tensor
    path: Tensor
    latents: Tensor
    coverage: Tensor
    pictures: Tensor

    @property
    def filled(self) -> Tensor:
        """Which slots have a concept, bool [B,N]."""
        return torch.arange(self.label_ids.shape[1]) < self.count[:, None]

    def without_concepts(self) -> Clips:
        """The same without pictures and labels."""
        return replace(self, count=torch.zeros_like(self.count))

    def told(self, token_ids: Tensor, token_mask: Tensor) -> Clips:
        """The same with other captions."""
        return replace(self, token_ids=token_ids, token_mask=token_mask)

    def swapped(self) -> Clips:
        """The same, each picture that of the next concept; all have two."""
        return replace(self, pictures=self.pictures[:, [1, 0, *range(2, self.pictures.shape[1])]])

    def without_captions(self, some: np.ndarray, empty: tuple[Tensor, Tensor]) -> Clips:
        """The same with the tokens of no caption, [1,T] each, in the place of ``some``, bool [B]."""
        left = torch.from_numpy(some)[:, None]
        ids, mask = empty
        return self.told(torch.where(left, ids, self.token_ids), torch.where(left, mask, self.token_mask))


class ClipPool:
    """The pool in a folder, drawn there where it is not yet whole: the same clips every time."""

    def __init__(self, folder: Path, config: ModelConfig, vae: BlockVAE, clips: int = CLIPS) -> None:
        self.clips, self.config = clips, config
        folder.mkdir(parents=True, exist_ok=True)
        progress = folder / "drawn.json"
        done = json.loads(progress.read_text())["clips"] if progress.exists() else 0
        starts = range(done, clips, PART)
        for start in tqdm(starts, "draw", unit="part", disable=not starts):
            seeds = range(FIRST_SEED + start, FIRST_SEED + min(start + PART, clips))
            drawn = draw([random_scene(seed, held_out=False) for seed in seeds], config, vae)
            for name, value in drawn.items():
                _array(folder / f"{name}.npy", clips, value)[start : start + len(value)] = value
            write_json(progress, {"clips": min(start + PART, clips)})
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in KEPT}
        ids, mask = tokenise(build_tokenizer(), [""], config.text_tokens)
        self.no_caption = torch.from_numpy(ids), torch.from_numpy(mask)

    def order(self, seed: int, steps: int, size: int) -> np.ndarray:
        """Which clips ``steps`` steps of ``size`` meet, int64 [steps,size]: the whole pool over and over,
        each time in another order."""
        rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
        rounds = -(-steps * size // self.clips)
        whole = np.concatenate([rng.permutation(self.clips) for _ in range(rounds)])
        return whole[: steps * size].reshape(steps, size)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Clips:
        """The clips of these numbers."""
        return clips_of({name: array[rows] for name, array in self.arrays.items()}, self.config)


def clips_of(arrays: Arrays, config: ModelConfig) -> Clips:
    """What ``draw`` gives, as a model takes it."""
    found = {name: torch.from_numpy(array) for name, array in arrays.items()}
    mean, std = torch.tensor([config.vae["latents_mean"], config.vae["latents_std"]]).view(2, -1, 1, 1, 1)
    return Clips(
        found["count"],
        found["token_ids"].long(),
        found["token_mask"],
        found["label_ids"].long(),
        found["label_mask"],
        found["path"],
        (found["latents"].float() - mean) / std,
        found["coverage"].float() / 255,
        for_clip(found["pictures"]),
    )


def _array(path: Path, clips: int, like: np.ndarray) -> np.ndarray:
    if path.exists():
        return np.load(path, mmap_mode="r+")
    shape = (clips, *like.shape[1:])
    return np.lib.format.open_memmap(path, mode="w+", dtype=like.dtype, shape=shape)


@torch.no_grad()
def draw(scenes: Sequence[Scene], config: ModelConfig, vae: BlockVAE) -> Arrays:
    """Scenes as ``KEPT`` lists them: tokens as int16, latents as float16, pictures uint8 [n,N,S,S,3]. The
    same every time."""
    arrays = tokenised(arrays_of(scenes), config.text_tokens, config.concept.label_tokens)
    given = {name: torch.from_numpy(value) for name, value in arrays.items()}
    rngs = [np.random.Generator(np.random.Philox(key=[scene.seed, 7])) for scene in scenes]
    ground = [paint_background(scene.background, rng) for scene, rng in zip(scenes, rngs, strict=True)]
    casts = looks_of(given, "")
    video, visible = draw_clips(casts, given, torch.from_numpy(np.stack(ground)))
    rows, columns = filled(given["count"], given["noun"].shape[1])
    cast = {name: value[rows, columns] for name, value in casts.items()}
    drawn = in_parts(draw_references, cast, torch.Generator().manual_seed(scenes[0].seed))
    pictures = drawn.new_zeros((*given["noun"].shape, *drawn.shape[1:]))
    pictures[rows, columns] = drawn
    found = {name: arrays[name] for name in KEPT if name in arrays}
    for name in ("token_ids", "label_ids"):
        found[name] = found[name].astype(np.int16)
    found["latents"] = vae.encode(from_bytes(video)).half().numpy()
    return found | {"coverage": coverage(visible).numpy(), "pictures": pictures.numpy()}
