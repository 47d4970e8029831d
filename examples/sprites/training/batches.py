"""Training batches from encoded shards: latents, sentences, pictures, masks, and what is dropped for
guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from conceptmaster.engine.encoders import CLIP_MEAN, CLIP_STD

from ..world.draw import draw_reference, paint_along
from ..world.scenes import (
    ACCESSORIES,
    MAX_CONCEPTS,
    NOUNS,
    PERIODS,
    TEXTURES,
    Actor,
    Identity,
    random_identity,
    random_scene,
)
from ..world.vocabulary import tokenise
from .pool import LATENTS, Shard, open_shard, shards

MEAN, STD = np.asarray(CLIP_MEAN, np.float32), np.asarray(CLIP_STD, np.float32)
PORTRAIT = 32
"""Side of the upright sprite that a training-only head redraws from the visual queries: as large as in a
video, since what is smaller keeps no pattern."""
PORTRAIT_FILE = f"portraits-{PORTRAIT}.npy"
TRAITS_FILE = "traits.npy"
PATTERNS_FILE = "patterns.npy"
RUNS = 7
"""How a texture runs: cosine and sine of its angle, of twice and of four times its angle, and its period."""
TURNS = ((0, 1, ("stripes",)), (2, 2, ("stripes", "checks")), (4, 4, ("dots",)))
"""Column of a cosine and a sine among these, how many times the angle they are of, and of which textures."""


@dataclass(frozen=True)
class Dropped:
    """How often training leaves out the concepts (pictures with their labels), the caption, and both; and how
    often a picture is ``foreign`` (see ``decoys.py``), so that only its label says what it shows."""

    concepts: float = 0.10
    caption: float = 0.06
    both: float = 0.06
    foreign: float = 0.0


class Tensors:
    """A dataclass of tensors that go to a device together."""

    def to(self, device: str) -> Self:
        """The batch on a device."""
        values = vars(self).values()
        return type(self)(*(value.to(device, non_blocking=True) for value in values))

    def __getitem__(self, rows: Tensor) -> Self:
        """Some of its rows; ``rows`` bool or int64 [B]."""
        return type(self)(*(value[rows] for value in vars(self).values()))


@dataclass(frozen=True)
class Captions(Tensors):
    """A batch of sentences without pictures or latents; fields as in ``Batch``."""

    token_ids: Tensor
    token_mask: Tensor
    label_ids: Tensor
    label_mask: Tensor
    coverage: Tensor


@dataclass(frozen=True)
class Pictures(Tensors):
    """A batch of references alone: pixels [M,3,px,px] (CLIP-normalised), label_ids/label_mask [M,L],
    portraits [M,3,32,32] in -1..1, traits int64 [M,3], patterns [M,RUNS]."""

    pixels: Tensor
    label_ids: Tensor
    label_mask: Tensor
    portraits: Tensor
    traits: Tensor
    patterns: Tensor


@dataclass
class Batch(Tensors):
    """One training batch; N slots of which ``concept_mask`` tells the filled ones, in random order.

    latents and decoys (see ``decoys.py``) [B,Cz,F,H,W], token_ids/token_mask [B,T], pixels [B,N,3,px,px]
    (CLIP-normalised), foreign [B,N]: which of these show another noun, label_ids/label_mask [B,N,L],
    concept_mask [B,N], coverage [B,N,F,H,W] in 0..1, portraits [B,N,3,32,32] in -1..1, traits int64 [B,N,3]
    (texture, accessory, noun), patterns [B,N,RUNS] (see ``how_it_runs``).
    """

    latents: Tensor
    decoys: Tensor
    token_ids: Tensor
    token_mask: Tensor
    pixels: Tensor
    foreign: Tensor
    label_ids: Tensor
    label_mask: Tensor
    concept_mask: Tensor
    coverage: Tensor
    portraits: Tensor
    traits: Tensor
    patterns: Tensor


def how_it_runs(look: Identity) -> np.ndarray:
    """What tells a texture from others of its kind, float32 [RUNS]; NaN where the kind has no such thing.

    Checks look the same after half a turn, dots after a quarter: twice and four times the angle do not jump
    there. Stripes change places after half a turn; twice the angle says how they lie. The period is scaled to
    -1..1.
    """
    runs = np.full(RUNS, np.nan, np.float32)
    for column, times, kinds in TURNS:
        if look.texture in kinds:
            runs[column : column + 2] = np.cos(times * look.angle), np.sin(times * look.angle)
    if look.texture != "plain":
        runs[6] = (look.period - np.mean(PERIODS)) / (np.ptp(PERIODS) / 2)
    return runs


def new_pictures(
    rng: np.random.Generator, size: int, label: Callable[[str], tuple[np.ndarray, np.ndarray]]
) -> Pictures:
    """References of looks that are drawn here and nowhere else, none of them held out, as
    ``LatentPool.pictures`` gives those of its clips; ``label`` is the pool's. What a model learns from looks
    that come back it tells of these alone."""
    pictures, faces, traits, patterns, labels = [], [], [], [], []
    for _ in range(size):
        look, noun = random_identity(rng, held_out=False), str(rng.choice(NOUNS))
        actor = Actor(noun, noun, look, radius=1.0, start=(0.0, 0.0), cell=(1, 1), motion="still")
        pictures.append(draw_reference(actor, rng))
        faces.append(_upright(actor))
        traits.append(_traits(actor))
        patterns.append(how_it_runs(look))
        labels.append(label(noun))
    label_ids, label_mask = (torch.from_numpy(np.stack(each)) for each in zip(*labels, strict=True))
    return Pictures(
        _for_clip(np.stack(pictures)),
        label_ids,
        label_mask,
        _minus_one_to_one(np.stack(faces)),
        torch.from_numpy(np.array(traits, np.int64)),
        torch.from_numpy(np.stack(patterns)),
    )


def _upright(actor: Actor) -> np.ndarray:
    """A concept upright and alone on grey, uint8 [32,32,3]."""
    centre = np.full((1, 2), PORTRAIT / 2, np.float32)
    rgb, alpha = paint_along(actor.noun, actor.identity, 0.35 * PORTRAIT, centre, size=PORTRAIT)
    return np.round((0.5 * (1 - alpha[0, ..., None]) + rgb[0]).clip(0, 1) * 255).astype(np.uint8)


def _traits(actor: Actor) -> tuple[int, int, int]:
    """Numbers of a concept's texture, accessory and noun."""
    look = actor.identity
    return TEXTURES.index(look.texture), ACCESSORIES.index(look.accessory), NOUNS.index(actor.noun)


def portraits(shard: Shard, first_seed: int, held_out: bool = False) -> None:
    """Write beside a shard, unless they are there, every concept upright and alone on grey (uint8
    [n,N,32,32,3]), what it is (traits, uint8 [n,N,3]: texture, accessory, noun) and how its texture runs
    (patterns, float32 [n,N,RUNS])."""
    if all((shard.folder / name).exists() for name in (PORTRAIT_FILE, TRAITS_FILE, PATTERNS_FILE)):
        return
    faces = np.full((len(shard.captions), MAX_CONCEPTS, PORTRAIT, PORTRAIT, 3), 128, np.uint8)
    traits = np.zeros((len(shard.captions), MAX_CONCEPTS, 3), np.uint8)
    patterns = np.full((len(shard.captions), MAX_CONCEPTS, RUNS), np.nan, np.float32)
    for k in range(len(faces)):
        for n, actor in enumerate(random_scene(first_seed + k, held_out=held_out).actors):
            faces[k, n], traits[k, n] = _upright(actor), _traits(actor)
            patterns[k, n] = how_it_runs(actor.identity)
    for name, array in ((PORTRAIT_FILE, faces), (TRAITS_FILE, traits), (PATTERNS_FILE, patterns)):
        partial = shard.folder / f".{name}.tmp.npy"
        np.save(partial, array)
        partial.rename(shard.folder / name)


def is_encoded(folder: Path) -> bool:
    """Whether a shard has all that training reads beside its clips."""
    names = (*LATENTS, PORTRAIT_FILE, TRAITS_FILE, PATTERNS_FILE)
    return all((folder / name).exists() for name in names)


class LatentPool:
    """All encoded shards of a folder; grows when ``refresh`` finds new ones."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, text_tokens: int, label_tokens: int) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.text_tokens, self.label_tokens = text_tokens, label_tokens
        self.latents: list[np.ndarray] = []
        self.decoys: list[np.ndarray] = []
        self.shards: list[Shard] = []
        self.portraits: list[np.ndarray] = []
        self.traits: list[np.ndarray] = []
        self.patterns: list[np.ndarray] = []
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
            if folder in known or not is_encoded(folder):
                continue
            shard = open_shard(folder)
            self.shards.append(shard)
            for arrays, name in zip((self.latents, self.decoys), LATENTS, strict=True):
                arrays.append(np.load(folder / name, mmap_mode="r"))
            self.portraits.append(np.load(folder / PORTRAIT_FILE, mmap_mode="r"))
            self.traits.append(np.load(folder / TRAITS_FILE))
            self.patterns.append(np.load(folder / PATTERNS_FILE))
            self.tokens.append(tokenise(self.tokenizer, shard.captions, self.text_tokens))
        return len(self.shards)

    def close(self) -> None:
        """End what the pool has started: nothing, where all is read from files."""

    def label(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask [L] of one label."""
        if text not in self._label_cache:
            ids, mask = tokenise(self.tokenizer, [text], self.label_tokens)
            self._label_cache[text] = ids[0], mask[0]
        return self._label_cache[text]

    def batch(self, rng: np.random.Generator, size: int, dropped: Dropped) -> Batch:
        """A random batch; the same generator state gives the same batch."""
        return self.collate([self._pick(rng) for _ in range(size)], rng, dropped)

    def _pick(self, rng: np.random.Generator) -> tuple[int, int]:
        """A random clip: its shard's number and its own in that."""
        s = int(rng.integers(len(self.shards)))
        return s, int(rng.integers(len(self.shards[s].captions)))

    def captions(self, rng: np.random.Generator, size: int) -> Captions:
        """A random batch of captions with their labels and what they tell."""
        ids, mask = np.zeros((size, self.text_tokens), np.int64), np.zeros((size, self.text_tokens), bool)
        label_ids = np.zeros((size, MAX_CONCEPTS, self.label_tokens), np.int64)
        label_mask = np.zeros(label_ids.shape, bool)
        coverage = np.zeros((size, *self.shards[0].coverage.shape[1:]), np.float32)
        for b in range(size):
            s, k = self._pick(rng)
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
        clips, decoys = (
            (np.stack([arrays[s][k] for s, k in picks]).astype(np.float32) - self.mean) / self.std
            for arrays in (self.latents, self.decoys)
        )
        ids = np.stack([self.tokens[s][0][k] for s, k in picks])
        mask = np.stack([self.tokens[s][1][k] for s, k in picks])
        pixels = np.zeros((size, n, *self.shards[0].references.shape[3:]), np.uint8)
        label_ids, label_mask = np.zeros((size, n, length), np.int64), np.zeros((size, n, length), bool)
        foreign = np.zeros((size, n), bool)
        concept_mask = np.zeros((size, n), bool)
        coverage = np.zeros((size, n, *self.shards[0].coverage.shape[2:]), np.float32)
        faces = np.zeros((size, n, PORTRAIT, PORTRAIT, 3), np.uint8)
        traits = np.zeros((size, n, 3), np.int64)
        patterns = np.full((size, n, RUNS), np.nan, np.float32)
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
                foreign[b, slot] = rng.random() < dropped.foreign
                own = shard.references[k, i, rng.integers(shard.references.shape[2])]
                pixels[b, slot] = shard.foreign[k, i] if foreign[b, slot] else own
                label_ids[b, slot], label_mask[b, slot] = self.label(labels[i])
                concept_mask[b, slot] = not no_concepts
                coverage[b, slot] = shard.coverage[k, i]
                faces[b, slot], traits[b, slot] = self.portraits[s][k, i], self.traits[s][k, i]
                patterns[b, slot] = self.patterns[s][k, i]
        return Batch(
            torch.from_numpy(clips),
            torch.from_numpy(decoys),
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            _for_clip(pixels),
            torch.from_numpy(foreign),
            torch.from_numpy(label_ids),
            torch.from_numpy(label_mask),
            torch.from_numpy(concept_mask),
            torch.from_numpy(coverage / 255),
            _minus_one_to_one(faces),
            torch.from_numpy(traits),
            torch.from_numpy(patterns),
        )

    def pictures(self, rng: np.random.Generator, size: int) -> Pictures:
        """Random references alone."""
        pixels = np.zeros((size, *self.shards[0].references.shape[3:]), np.uint8)
        label_ids = np.zeros((size, self.label_tokens), np.int64)
        label_mask = np.zeros(label_ids.shape, bool)
        faces = np.zeros((size, PORTRAIT, PORTRAIT, 3), np.uint8)
        traits = np.zeros((size, 3), np.int64)
        patterns = np.zeros((size, RUNS), np.float32)
        for m in range(size):
            s, k = self._pick(rng)
            shard = self.shards[s]
            n, r = int(rng.integers(len(shard.labels[k]))), int(rng.integers(shard.references.shape[2]))
            pixels[m] = shard.references[k, n, r]
            label_ids[m], label_mask[m] = self.label(shard.labels[k][n])
            faces[m], traits[m] = self.portraits[s][k, n], self.traits[s][k, n]
            patterns[m] = self.patterns[s][k, n]
        return Pictures(
            _for_clip(pixels),
            torch.from_numpy(label_ids),
            torch.from_numpy(label_mask),
            _minus_one_to_one(faces),
            torch.from_numpy(traits),
            torch.from_numpy(patterns),
        )


def _for_clip(pixels: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W], normalised as CLIP's pictures are."""
    return _channels_first((pixels.astype(np.float32) / 255 - MEAN) / STD)


def _minus_one_to_one(pixels: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in -1..1."""
    return _channels_first(pixels.astype(np.float32) / 127.5 - 1)


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))
