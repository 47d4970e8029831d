"""From seeds to what a device draws and a model reads: scenes, their words, their casts.

All of it is Python that takes a millisecond and a half for a clip, and so many clips does a GPU learn from in
that time that ``Studio`` has other processes do it ahead of time.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from conceptmaster.engine.config import ModelConfig

from ..world import grounds
from ..world.atlas import Atlas
from ..world.captions import tell
from ..world.drawing import Cast, Stage, cast_of
from ..world.looks import Look, random_look
from ..world.scenes import FRAMES, MAX_CONCEPTS, MOTIONS, Actor, Scene, Wish, generator, random_scene
from ..world.tokens import fits, tokenise
from .placing import NOBODY, spot_of

TRIES = 1 << 40
"""Distance between the seeds that are tried for one clip, where a caption is too long for the model."""


@dataclass(frozen=True)
class Page:
    """Some scenes that are drawn together, with the cast of their decoys (None: without decoys), what is told
    by words (see ``Writer.words``, and captions without places), a seed for what the scenes do not tell."""

    stage: Stage
    cast: Cast
    others: Cast | None
    words: dict[str, Tensor]
    seed: int

    def to(self, device: str) -> Self:
        """The same with what is drawn on a device; the words stay."""
        others = None if self.others is None else self.others.to(device)
        return type(self)(self.stage.to(device), self.cast.to(device), others, self.words, self.seed)


class Writer:
    """Makes scenes and words from seeds; the pictures of the atlas it does not look at."""

    def __init__(self, atlas: Atlas, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self.atlas, self.tokenizer, self.config = atlas, tokenizer, config
        self.paintings_each = grounds.EACH

    def without_pictures(self) -> Writer:
        """One that takes few bytes to another process."""
        assert len(self.atlas.colours) == len(self.atlas.entries)  # known from here on
        light = copy.copy(self.atlas)
        object.__setattr__(light, "tiles", self.atlas.tiles[:0])
        return Writer(light, self.tokenizer, self.config)

    def scenes(self, seeds: range, wish: Wish) -> list[Scene]:
        """A scene for every seed, whose words fit into the model."""
        return [self._scene(seed, wish) for seed in seeds]

    def _scene(self, seed: int, wish: Wish) -> Scene:
        while True:
            scene = random_scene(seed, self.atlas, wish)
            labels = [actor.label for actor in scene.actors]
            if fits(self.tokenizer, [tell(scene)], self.config.text_tokens) and fits(
                self.tokenizer, labels, self.config.concept.label_tokens
            ):
                return scene
            seed += TRIES

    def words(self, scenes: list[Scene]) -> dict[str, Tensor]:
        """Token ids and masks of captions and labels, as ``Batch`` has them, ``motion`` int64 [n,N] of
        ``MOTIONS``, ``track`` float32 [n,N,F,4], ``spot`` int64 [n,N], see ``placing``, and ``count`` [n],
        the number of concepts."""
        ids, mask = tokenise(self.tokenizer, [tell(scene) for scene in scenes], self.config.text_tokens)
        length = self.config.concept.label_tokens
        label_ids = np.zeros((len(scenes), MAX_CONCEPTS, length), np.int64)
        label_mask = np.zeros(label_ids.shape, bool)
        motion, spot = np.zeros(label_ids.shape[:2], np.int64), np.full(label_ids.shape[:2], NOBODY)
        track = np.zeros((*motion.shape, FRAMES, 4), np.float32)
        for row, scene in enumerate(scenes):
            count = len(scene.actors)
            found = tokenise(self.tokenizer, [actor.label for actor in scene.actors], length)
            label_ids[row, :count], label_mask[row, :count] = found
            motion[row, :count] = [MOTIONS.index(actor.motion) for actor in scene.actors]
            track[row, :count] = [actor.track() for actor in scene.actors]
            spot[row, :count] = [spot_of(actor) for actor in scene.actors]
        arrays = {"token_ids": ids, "token_mask": mask, "label_ids": label_ids, "label_mask": label_mask}
        arrays |= {"motion": motion, "track": track, "spot": spot}
        arrays["count"] = np.array([len(scene.actors) for scene in scenes])
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def page(self, scenes: list[Scene], seed: int, decoys: bool = True) -> Page:
        """What is needed to draw scenes together."""
        others = Cast.of(*self._others(scenes, seed)) if decoys else None
        stage = Stage.of(scenes, self.paintings_each)
        return Page(stage, cast_of(scenes), others, self.words(scenes) | self._loose(scenes), seed)

    def _loose(self, scenes: list[Scene]) -> dict[str, Tensor]:
        """Token ids and masks of the same captions without places."""
        texts = [tell(scene, places=False) for scene in scenes]
        ids, mask = tokenise(self.tokenizer, texts, self.config.text_tokens)
        return {"loose_ids": torch.from_numpy(ids), "loose_mask": torch.from_numpy(mask)}

    def _others(self, scenes: list[Scene], seed: int) -> tuple[list[int], list[Look]]:
        """Other pictures, or other looks of the same, for the decoys of scenes."""
        rng = generator(seed, 103)
        by_noun = self.atlas.of(scenes[0].wish.split)
        names = list(by_noun)
        pictures, looks = [], []
        for actor in (actor for scene in scenes for actor in scene.actors):
            noun = actor.noun if rng.random() < 0.65 else names[int(rng.integers(len(names)))]
            alike = by_noun[noun]
            own = noun == actor.noun and rng.random() < 0.5
            pictures.append(actor.picture if own else alike[int(rng.integers(len(alike)))])
            looks.append(random_look(rng))
        return pictures, looks

    def told(self, seeds: range, wish: Wish) -> dict[str, Tensor]:
        """The words of scenes that are not drawn, and what they tell, laid out as discs: ``coverage``, as
        ``Captions`` has it."""
        return self.told_of(self.scenes(seeds, wish))

    def told_of(self, scenes: list[Scene]) -> dict[str, Tensor]:
        """As ``told``, of scenes that are there."""
        covered = np.zeros((len(scenes), MAX_CONCEPTS, *self.config.latent_shape[1:]), np.float32)
        for row, scene in enumerate(scenes):
            for slot, actor in enumerate(scene.actors):
                covered[row, slot] = disc(actor, self.config.latent_shape[2])
        return self.words(scenes) | {"coverage": torch.from_numpy(covered)}


def disc(actor: Actor, side: int) -> np.ndarray:
    """Roughly how much of every latent cell a disc in an actor's place covers, float32 [F,side,side]."""
    cell = 64.0 / side
    track = actor.track()
    axis = (np.arange(side, dtype=np.float32) + 0.5) * cell
    dx, dy = axis[None, None, :] - track[:, 0, None, None], axis[None, :, None] - track[:, 1, None, None]
    inside = 0.5 + (0.85 * track[:, 2, None, None] - np.hypot(dx, dy)) / cell
    covered = inside.clip(0, 1)
    return np.concatenate([covered[:1], covered[1:].reshape(-1, 4, side, side).mean(1)])


def to_numpy(value: Any) -> Any:
    """A page, or anything else made of tensors, with arrays in their place: processes hand those over by
    value."""
    return _each(value, lambda tensor: tensor.numpy() if isinstance(tensor, Tensor) else tensor)


def to_torch(value: Any) -> Any:
    """The other way."""
    return _each(value, lambda array: torch.from_numpy(array) if isinstance(array, np.ndarray) else array)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, Page | Stage | Cast):
        return type(value)(*(_each(part, change) for part in vars(value).values()))
    if isinstance(value, dict):
        return {name: _each(part, change) for name, part in value.items()}
    return change(value)
