"""Training batches from encoded shards: latents, sentences, pictures, masks, and what is dropped for
guidance."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .draw import paint_along
from .pool import Shard, open_shard, shards
from .world import MAX_CONCEPTS, random_scene

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
PORTRAIT = 24
"""Side of the upright sprite that a training-only head redraws from the visual queries."""


@dataclass(frozen=True)
class Dropped:
    """How often training leaves out the concepts (pictures with their labels), the caption, and both."""

    concepts: float = 0.10
    caption: float = 0.06
    both: float = 0.06


@dataclass(frozen=True)
class Captions:
    """A batch of sentences without pictures or latents; fields as in ``Batch``."""

    token_ids: Tensor
    token_mask: Tensor
    label_ids: Tensor
    label_mask: Tensor
    coverage: Tensor

    def to(self, device: str) -> Captions:
        """The batch on a device."""
        return Captions(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass
class Batch:
    """One training batch; N slots of which ``concept_mask`` tells the filled ones, in random order.

    latents [B,Cz,F,H,W], token_ids/token_mask [B,T], pixels [B,N,3,px,px] (CLIP-normalised),
    label_ids/label_mask [B,N,L], concept_mask [B,N], coverage [B,N,F,H,W] in 0..1, portraits [B,N,3,24,24]
    in -1..1.
    """

    latents: Tensor
    token_ids: Tensor
    token_mask: Tensor
    pixels: Tensor
    label_ids: Tensor
    label_mask: Tensor
    concept_mask: Tensor
    coverage: Tensor
    portraits: Tensor

    def to(self, device: str) -> Batch:
        """The batch on a device."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def tokenise(tokenizer: Tokenizer, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [n, length] padded with 0, and their mask. Raises ValueError for a text that is too
    long."""
    ids, mask = np.zeros((len(texts), length), np.int64), np.zeros((len(texts), length), bool)
    for row, encoding in enumerate(tokenizer.encode_batch(texts)):
        if len(encoding.ids) > length:
            raise ValueError(f"{texts[row]!r} takes {len(encoding.ids)} tokens, more than {length}")
        ids[row, : len(encoding.ids)] = encoding.ids
        mask[row, : len(encoding.ids)] = True
    return ids, mask


def portraits(shard: Shard, first_seed: int, held_out: bool = False) -> np.ndarray:
    """Every concept of a shard upright and alone on grey, uint8 [n, N, 24, 24, 3]; kept beside the shard."""
    path = shard.folder / "portraits.npy"
    if not path.exists():
        out = np.full((len(shard.captions), MAX_CONCEPTS, PORTRAIT, PORTRAIT, 3), 128, np.uint8)
        centre = np.full((1, 2), PORTRAIT / 2, np.float32)
        for k in range(len(out)):
            for n, actor in enumerate(random_scene(first_seed + k, held_out=held_out).actors):
                rgb, alpha = paint_along(actor.noun, actor.identity, 8.5, centre, size=PORTRAIT)
                out[k, n] = np.round((0.5 * (1 - alpha[0, ..., None]) + rgb[0]).clip(0, 1) * 255)
        partial = path.with_name(".portraits.tmp.npy")
        np.save(partial, out)
        partial.rename(path)
    return np.load(path, mmap_mode="r")


class LatentPool:
    """All encoded shards of a folder; grows when ``refresh`` finds new ones."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, text_tokens: int, label_tokens: int) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.text_tokens, self.label_tokens = text_tokens, label_tokens
        self.latents: list[np.ndarray] = []
        self.shards: list[Shard] = []
        self.portraits: list[np.ndarray] = []
        self.tokens: list[tuple[np.ndarray, np.ndarray]] = []
        self._label_cache: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.mean, self.std = np.zeros((1, 1, 1, 1), np.float32), np.ones((1, 1, 1, 1), np.float32)
        self.refresh()

    def normalise(self, mean: list[float], std: list[float]) -> None:
        """Set the statistics by which latents are normalised."""
        self.mean = np.asarray(mean, np.float32)[:, None, None, None]
        self.std = np.asarray(std, np.float32)[:, None, None, None]

    def refresh(self) -> int:
        """Take up shards that have been encoded since; returns how many there are."""
        known = {shard.folder for shard in self.shards}
        for folder in shards(self.folder):
            if (
                folder in known
                or not (folder / "latents.npy").exists()
                or not (folder / "portraits.npy").exists()
            ):
                continue
            shard = open_shard(folder)
            self.shards.append(shard)
            self.latents.append(np.load(folder / "latents.npy"))
            self.portraits.append(np.load(folder / "portraits.npy", mmap_mode="r"))
            self.tokens.append(tokenise(self.tokenizer, shard.captions, self.text_tokens))
        return len(self.shards)

    def label(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask [L] of one label."""
        if text not in self._label_cache:
            ids, mask = tokenise(self.tokenizer, [text], self.label_tokens)
            self._label_cache[text] = ids[0], mask[0]
        return self._label_cache[text]

    def batch(self, rng: np.random.Generator, size: int, dropped: Dropped) -> Batch:
        """A random batch; the same generator state gives the same batch."""
        picks = []
        for _ in range(size):
            s = int(rng.integers(len(self.shards)))
            picks.append((s, int(rng.integers(len(self.shards[s].captions)))))
        return self.collate(picks, rng, dropped)

    def captions(self, rng: np.random.Generator, size: int) -> Captions:
        """A random batch of captions with their labels and what they tell."""
        ids, mask = np.zeros((size, self.text_tokens), np.int64), np.zeros((size, self.text_tokens), bool)
        label_ids = np.zeros((size, MAX_CONCEPTS, self.label_tokens), np.int64)
        label_mask = np.zeros(label_ids.shape, bool)
        coverage = np.zeros((size, *self.shards[0].coverage.shape[1:]), np.float32)
        for b in range(size):
            s = int(rng.integers(len(self.shards)))
            k = int(rng.integers(len(self.shards[s].captions)))
            ids[b], mask[b] = self.tokens[s][0][k], self.tokens[s][1][k]
            for n, label in enumerate(self.shards[s].labels[k]):
                label_ids[b, n], label_mask[b, n] = self.label(label)
                coverage[b, n] = self.shards[s].coverage[k, n]
        arrays = ids, mask, label_ids, label_mask, coverage / 255
        return Captions(*(torch.from_numpy(array) for array in arrays))

    def collate(self, picks: list[tuple[int, int]], rng: np.random.Generator, dropped: Dropped) -> Batch:
        """The batch of given (shard, clip) pairs; ``rng`` chooses references, slots and what is dropped."""
        size, n, length = len(picks), MAX_CONCEPTS, self.label_tokens
        empty_ids, empty_mask = tokenise(self.tokenizer, [""], self.text_tokens)
        latents = np.stack([self.latents[s][k] for s, k in picks]).astype(np.float32)
        ids = np.stack([self.tokens[s][0][k] for s, k in picks])
        mask = np.stack([self.tokens[s][1][k] for s, k in picks])
        pixels = np.zeros((size, n, *self.shards[0].references.shape[3:]), np.uint8)
        label_ids, label_mask = np.zeros((size, n, length), np.int64), np.zeros((size, n, length), bool)
        concept_mask = np.zeros((size, n), bool)
        coverage = np.zeros((size, n, *self.shards[0].coverage.shape[2:]), np.float32)
        faces = np.zeros((size, n, PORTRAIT, PORTRAIT, 3), np.uint8)
        for b, (s, k) in enumerate(picks):
            shard = self.shards[s]
            fate = rng.random()
            no_concepts = fate < dropped.concepts + dropped.both
            no_caption = dropped.concepts <= fate < dropped.concepts + dropped.both + dropped.caption
            if no_caption:
                ids[b], mask[b] = empty_ids[0], empty_mask[0]
            labels = shard.labels[k]
            slots = rng.permutation(n)[: len(labels)]
            for i, slot in enumerate(slots):
                pixels[b, slot] = shard.references[k, i, rng.integers(shard.references.shape[2])]
                label_ids[b, slot], label_mask[b, slot] = self.label(labels[i])
                concept_mask[b, slot] = not no_concepts
                coverage[b, slot] = shard.coverage[k, i]
                faces[b, slot] = self.portraits[s][k, i]
        pictures = (pixels.astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
        return Batch(
            torch.from_numpy((latents - self.mean) / self.std),
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 1, 4, 2, 3))),
            torch.from_numpy(label_ids),
            torch.from_numpy(label_mask),
            torch.from_numpy(concept_mask),
            torch.from_numpy(coverage / 255),
            torch.from_numpy(
                np.ascontiguousarray(faces.transpose(0, 1, 4, 2, 3)).astype(np.float32) / 127.5 - 1
            ),
        )
