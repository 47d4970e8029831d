"""Training batches: latents, sentences, pictures, masks, and what is dropped for guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.encoders import CLIP_MEAN, CLIP_STD
from conceptmaster.runtime.boxes import SLACK

from ..world.paint_many import draw_references
from ..world.scenes import MAX_CONCEPTS, NOUNS, Actor, random_identity
from ..world.vocabulary import build_tokenizer, tokenise
from .clip_arrays import cast_of, in_parts, targets_of
from .options import Dropped

KEEP_ALL = Dropped(0, 0, 0)


class Tensors:
    """A dataclass of tensors that belong together, row by row."""

    def to(self, device: str) -> Self:
        """The same on a device."""
        return type(self)(*(value.to(device, non_blocking=True) for value in vars(self).values()))

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
    """A batch of references alone: pixels [M,3,px,px] (CLIP-normalised), portraits [M,3,32,32] in -1..1,
    traits int64 [M,3], patterns [M,RUNS]."""

    pixels: Tensor
    portraits: Tensor
    traits: Tensor
    patterns: Tensor


@dataclass
class Batch(Tensors):
    """One training batch; N slots of which ``concept_mask`` tells the filled ones, in random order.

    latents and decoys (see ``decoys.py``) [B,Cz,F,H,W], token_ids/token_mask [B,T], pixels [B,N,3,px,px]
    (CLIP-normalised), foreign [B,N]: which of these show another noun, label_ids/label_mask [B,N,L],
    concept_mask [B,N], coverage [B,N,F,H,W] in 0..1, portraits [B,N,3,32,32] in -1..1, traits int64 [B,N,3]
    (texture, accessory, noun), patterns [B,N,RUNS] (see ``clip_arrays.patterns``), box [B,N,4] (see
    ``boxes_of``; zero where it is left out), boxes bool [B,S,N]: which video token sees which concept (see
    ``tokens_in``; all see all in clips that are not ``boxed``).
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
    box: Tensor
    boxes: Tensor


def generator(rng: np.random.Generator, device: str) -> torch.Generator:
    """Random numbers on a device that follow from the state of ``rng``, which moves on."""
    return torch.Generator(device).manual_seed(int(rng.integers(2**62)))


def sent(array: np.ndarray, device: str | torch.device) -> Tensor:
    """A copy of an array on a device, which nobody waits for."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Pool:
    """Clips with all that training asks of them, kept on ``device``. The same state of a generator gives the
    same batch.

    ``arrays`` has, of each of n clips: latents, decoys [n,Cz,F,H,W], token_ids, token_mask [n,T], count [n];
    and for each of N concepts, of which ``count`` are there: label_ids, label_mask [n,N,L], references
    [n,N,R,H,W,3], foreign [n,N,H,W,3], coverage [n,N,5,8,8], portraits [n,N,32,32,3], traits [n,N,3],
    patterns [n,N,RUNS].
    """

    def __init__(self, config: ModelConfig, device: str) -> None:
        grid = zip(config.latent_shape[1:], config.transformer.patch_size, strict=True)
        self.grid = tuple(size // patch for size, patch in grid)
        self.device, self.tokens = device, (config.text_tokens, config.concept.label_tokens)
        self.arrays: dict[str, Tensor] = {}
        numbers = [config.vae["latents_mean"], config.vae["latents_std"]]
        self.mean, self.std = torch.tensor(numbers, device=device).view(2, -1, 1, 1, 1)
        empty = tokenise(build_tokenizer(), [""], config.text_tokens)
        self._no_caption = [torch.from_numpy(part).to(device) for part in empty]  # [1,T] each

    def __len__(self) -> int:
        return len(self.arrays["count"])

    def _some(self, rng: np.random.Generator, size: int) -> Tensor:
        return torch.from_numpy(rng.integers(len(self), size=size)).to(self.device)

    def batch(self, rng: np.random.Generator, size: int, dropped: Dropped) -> Batch:
        """A random batch."""
        return self.collate(self._some(rng, size), rng, dropped)

    def collate(self, clips: Tensor, rng: np.random.Generator, dropped: Dropped) -> Batch:
        """The batch of given clips, int64 [B]; ``rng`` chooses references, slots and what is dropped."""
        size, g = len(clips), generator(rng, self.device)

        def chance(*shape: int) -> Tensor:
            return torch.rand(size, *shape, generator=g, device=self.device)

        each = torch.arange(size, device=self.device)[:, None]
        # which[b,slot]: the concept in that slot; one beyond the clip's last stands for an empty slot
        which = chance(MAX_CONCEPTS).argsort(1)
        filled = which < self.arrays["count"][clips][:, None]
        references = self.arrays["references"][clips][each, which]  # [B,N,R,H,W,3]
        view = (chance(MAX_CONCEPTS) * references.shape[2]).long()
        fate = chance()
        no_concepts = fate < dropped.concepts + dropped.both
        some = dropped.concepts + dropped.both + dropped.caption
        no_caption = ((fate >= dropped.concepts) & (fate < some))[:, None]
        ids, mask = self._no_caption

        def slots(name: str, empty: float = 0) -> Tensor:
            """[B,N,…] of an array, with ``empty`` where no concept is."""
            value = self.arrays[name][clips][each, which]
            return torch.where(filled.view(*filled.shape, *[1] * (value.ndim - 2)), value, empty)

        foreign = (chance(MAX_CONCEPTS) < dropped.foreign) & filled
        strangers = self.arrays["foreign"][clips][each, which]
        own = references[each, torch.arange(MAX_CONCEPTS, device=self.device), view]
        pixels = torch.where(foreign[..., None, None, None], strangers, own) * filled[..., None, None, None]
        coverage = slots("coverage").float() / 255
        box, boxes = boxes_of(coverage), tokens_in(frame_boxes(coverage)[0], self.grid)  # [B,N,4], [B,S,N]
        if dropped.grounding:
            box = torch.where((chance(MAX_CONCEPTS) < dropped.grounding)[..., None], 0.0, box)
        boxed = chance() < dropped.boxed if dropped.boxed else torch.zeros_like(no_concepts)
        loose = (boxed & (chance() < dropped.loose))[:, None] if dropped.loose else no_caption & False
        latents, decoys = (
            (self.arrays[name][clips].float() - self.mean) / self.std for name in ("latents", "decoys")
        )
        return Batch(
            latents,
            decoys,
            torch.where(no_caption, ids, self._caption(clips, "ids", loose)),
            torch.where(no_caption, mask, self._caption(clips, "mask", loose)),
            for_clip(pixels),
            foreign,
            slots("label_ids"),
            slots("label_mask").bool(),
            filled & ~no_concepts[:, None],
            coverage,
            _minus_one_to_one(slots("portraits")),
            slots("traits").long(),
            slots("patterns", torch.nan),
            box,
            boxes | ~boxed[:, None, None],
        )

    def _caption(self, clips: Tensor, part: str, loose: Tensor) -> Tensor:
        """Of each clip the sentence, or where ``loose`` [B,1] that of ``tell_loosely``: [B,T]."""
        own = self.arrays[f"token_{part}"][clips]
        return torch.where(loose, self.arrays[f"loose_{part}"][clips], own) if loose.any() else own

    def captions(self, rng: np.random.Generator, size: int) -> Captions:
        """A random batch of captions with their labels and what they tell."""
        clips = self._some(rng, size)
        names = ("token_ids", "token_mask", "label_ids", "label_mask", "coverage")
        ids, mask, label_ids, label_mask, coverage = (self.arrays[name][clips] for name in names)
        return Captions(ids, mask, label_ids, label_mask, coverage.float() / 255)


def boxes_of(coverage: Tensor) -> Tensor:
    """The mean box of what is covered, over the frames that show any of it: coverage [B,N,F,H,W] -> left,
    top, right, bottom in 0..1 of width and height, [B,N,4]; zero for what is never seen."""
    boxes, seen = frame_boxes(coverage)
    return boxes.sum(-2) / seen.sum(-2).clamp(min=1)


def frame_boxes(coverage: Tensor) -> tuple[Tensor, Tensor]:
    """The box of what is covered in each latent frame, [B,N,F,4], zero where nothing is; whether anything is,
    bool [B,N,F,1]."""
    sides = []
    for axis in (-2, -1):  # columns are left where rows are reduced
        inside = coverage.amax(axis) > 0  # [B,N,F,W|H]
        size = inside.shape[-1]
        first = inside.float().argmax(-1)  # [B,N,F]
        sides.append((first / size, 1 - inside.flip(-1).float().argmax(-1) / size))
    (left, right), (top, bottom) = sides
    seen = coverage.flatten(-2).amax(-1, keepdim=True) > 0  # [B,N,F,1]
    return torch.stack((left, top, right, bottom), dim=-1) * seen, seen  # [B,N,F,4]


def tokens_in(boxes: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The video tokens that boxes [B,N,F,4] touch, as ``runtime.boxes.tokens`` has them, but none in an empty
    one: bool [B,S,N]. grid: patches by frame, row and column, each of as many of the F latent frames."""
    frames, rows, columns = grid

    def inside(first: Tensor, last: Tensor, count: int) -> Tensor:
        patch = torch.arange(count, device=boxes.device)
        begin, end = (first * count + SLACK).floor(), (last * count - SLACK).ceil()
        return (patch >= begin[..., None]) & (patch < end[..., None])

    down = inside(boxes[..., 1], boxes[..., 3], rows)  # [B,N,F,h]
    across = inside(boxes[..., 0], boxes[..., 2], columns)  # [B,N,F,w]
    touched = (down[..., None] & across[..., None, :]).unflatten(2, (frames, -1)).any(3)  # [B,N,f,h,w]
    return touched.flatten(2).transpose(1, 2).contiguous()


def new_pictures(rng: np.random.Generator, size: int, device: str, held_out: bool = False) -> Pictures:
    """References of looks that are drawn here and nowhere else: of those that are kept for judging, or of
    the others. What a model learns from looks that come back it tells of these alone."""
    actors = []
    for _ in range(size):
        look, noun = random_identity(rng, held_out=held_out), str(rng.choice(NOUNS))
        actors.append(Actor(noun, noun, look, radius=1.0, start=(0.0, 0.0), cell=(1, 1), motion="still"))
    cast = {name: value.to(device) for name, value in cast_of(actors).items()}
    told = targets_of(cast)
    pixels = for_clip(in_parts(draw_references, cast, generator(rng, device)))
    return Pictures(pixels, _minus_one_to_one(told["portraits"]), told["traits"].long(), told["patterns"])


def for_clip(pixels: Tensor) -> Tensor:
    """uint8 [...,H,W,3] -> float32 [...,3,H,W], normalised as CLIP's pictures are."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels.float() / 255 - mean) / std).movedim(-1, -3)


def _minus_one_to_one(pixels: Tensor) -> Tensor:
    """uint8 [...,H,W,3] -> float32 [...,3,H,W] in -1..1."""
    return (pixels.float() / 127.5 - 1).movedim(-1, -3)
