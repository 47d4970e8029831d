"""Training batches of the open world, drawn as they are needed, block by block, from seeds alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.encoders import CLIP_MEAN, CLIP_STD
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.examples.sprites.training.batches import Tensors

from ..world import drawing, grounds
from ..world.atlas import Atlas
from ..world.captions import tell
from ..world.looks import Look, random_look
from ..world.scenes import MAX_CONCEPTS, Actor, Scene, Wish, generator, random_scene
from ..world.tokens import fits, tokenise
from .options import Dropped, Supply

CHUNK = 16
"""Clips that are drawn together."""
REFERENCES = 2
"""Reference pictures of every concept of a clip, of which a batch takes one."""
FEW = 2
"""Concepts of a clip that has few."""
TRIES = 1 << 40
"""Distance between the seeds that are tried for one clip, where a caption is too long for the model."""


@dataclass
class Batch(Tensors):
    """One training batch; N slots, as many as its fullest clip fills, of which ``concept_mask`` tells the
    filled ones.

    latents and decoys [B,Cz,F,H,W], token_ids/token_mask [B,T], pixels [B,N,3,px,px] (CLIP-normalised),
    label_ids/label_mask [B,N,L], concept_mask [B,N], coverage [B,N,F,H,W] in 0..1, portraits [B,N,3,32,32]
    in -1..1. A decoy is the same clip with other pictures.
    """

    latents: Tensor
    decoys: Tensor
    token_ids: Tensor
    token_mask: Tensor
    pixels: Tensor
    label_ids: Tensor
    label_mask: Tensor
    concept_mask: Tensor
    coverage: Tensor
    portraits: Tensor


@dataclass
class Captions(Tensors):
    """Sentences with their labels and what they tell; fields as in ``Batch``."""

    token_ids: Tensor
    token_mask: Tensor
    label_ids: Tensor
    label_mask: Tensor
    coverage: Tensor


class Artist:
    """Makes blocks of clips from seeds: scenes, words, pixels, latents.

    ``small`` is the VAE for clips of half the size (``components.halved``), of which the latents are those of
    the clips themselves.
    """

    def __init__(
        self, atlas: Atlas, tokenizer: Tokenizer, config: ModelConfig, small: BlockVAE, device: str = "cpu"
    ) -> None:
        self.atlas, self.tokenizer, self.config, self.device = atlas, tokenizer, config, device
        self.small = small.to(device)
        self.tiles = torch.from_numpy(atlas.tiles).to(device)
        self.paintings = torch.from_numpy(grounds.banks(0, config.height // 2)).to(device)

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
        """Token ids and masks of captions and labels, as ``Batch`` has them, on the CPU."""
        ids, mask = tokenise(self.tokenizer, [tell(scene) for scene in scenes], self.config.text_tokens)
        length = self.config.concept.label_tokens
        label_ids = np.zeros((len(scenes), MAX_CONCEPTS, length), np.int64)
        label_mask = np.zeros(label_ids.shape, bool)
        for row, scene in enumerate(scenes):
            count = len(scene.actors)
            found = tokenise(self.tokenizer, [actor.label for actor in scene.actors], length)
            label_ids[row, :count], label_mask[row, :count] = found
        arrays = {"token_ids": ids, "token_mask": mask, "label_ids": label_ids, "label_mask": label_mask}
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    @torch.no_grad()
    def draw(self, scenes: list[Scene], seed: int, decoys: bool = True) -> dict[str, Tensor]:
        """What a batch has of every scene, with ``REFERENCES`` reference pictures of each concept.

        Latents are float16, not normalised; pictures and portraits uint8. ``seed``: of what is not told by
        the scenes.
        """
        parts = [
            self._draw(scenes[k : k + CHUNK], seed * 4096 + k, decoys) for k in range(0, len(scenes), CHUNK)
        ]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return found | {name: value.to(self.device) for name, value in self.words(scenes).items()}

    def _draw(self, scenes: list[Scene], seed: int, decoys: bool) -> dict[str, Tensor]:
        stage = drawing.Stage.of(scenes, self.paintings.shape[1]).to(self.device)
        cast = drawing.cast_of(scenes).to(self.device)
        dressed = drawing.dress(self.tiles, cast)
        latents, visible = self._latents(dressed, cast.stretch, stage)
        found = {"latents": latents, "coverage": _by_latent_frame(visible)}
        found["decoys"] = latents
        if decoys:
            others = drawing.Cast.of(*self._others(scenes, seed)).to(self.device)
            found["decoys"] = self._latents(drawing.dress(self.tiles, others), others.stretch, stage)[0]
        g = torch.Generator(self.device).manual_seed(seed)
        pictures = [drawing.references(dressed, cast.stretch, g) for _ in range(REFERENCES)]
        for name, value in (
            ("references", torch.stack(pictures, 1)),
            ("portraits", drawing.upright(dressed, cast.stretch)),
        ):
            slots = value.new_full((len(scenes), MAX_CONCEPTS, *value.shape[1:]), 128)
            slots[stage.row, stage.slot] = value
            found[name] = slots
        return found

    @torch.no_grad()
    def pixels(self, scenes: list[Scene]) -> Tensor:
        """The clips of scenes at half the size, float [n,3,F,H/2,W/2] in -1..1."""
        return torch.cat([self._small(scenes[k : k + CHUNK]) for k in range(0, len(scenes), CHUNK)])

    def _small(self, scenes: list[Scene]) -> Tensor:
        stage = drawing.Stage.of(scenes, self.paintings.shape[1]).to(self.device)
        cast = drawing.cast_of(scenes).to(self.device)
        return self._clips(drawing.dress(self.tiles, cast), cast.stretch, stage)[0]

    def _clips(self, dressed: Tensor, stretch: Tensor, stage: drawing.Stage) -> tuple[Tensor, Tensor]:
        """Clips at half the size, from tiles of half the size, in -1..1, and what shows of their concepts."""
        fine = F.avg_pool2d(dressed, 2)
        clips, visible = drawing.clips(fine, stretch, stage, self.paintings, self.config.height // 2)
        return 2 * clips - 1, visible

    def _latents(self, dressed: Tensor, stretch: Tensor, stage: drawing.Stage) -> tuple[Tensor, Tensor]:
        clips, visible = self._clips(dressed, stretch, stage)
        return self.small.encode(clips).half(), visible

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

    @torch.no_grad()
    def pictures(self, seed: int, size: int) -> tuple[Tensor, Tensor]:
        """Pictures that are trained on, in looks of their own: references [size,3,px,px] (CLIP-normalised)
        and what they show upright, [size,3,32,32] in -1..1."""
        rng = generator(seed, 105)
        by_noun = list(self.atlas.of("train").values())
        some = [by_noun[int(rng.integers(len(by_noun)))] for _ in range(size)]
        chosen = [alike[int(rng.integers(len(alike)))] for alike in some]
        cast = drawing.Cast.of(chosen, [random_look(rng) for _ in chosen]).to(self.device)
        dressed = drawing.dress(self.tiles, cast)
        g = torch.Generator(self.device).manual_seed(seed)
        seen = drawing.references(dressed, cast.stretch, g)
        return for_clip(seen), drawing.upright(dressed, cast.stretch).float() / 127.5 - 1

    def captions(self, seeds: range, wish: Wish) -> Captions:
        """Sentences of scenes that are not drawn: what they tell is laid out as discs."""
        scenes = self.scenes(seeds, wish)
        told = np.zeros((len(scenes), MAX_CONCEPTS, *self.config.latent_shape[1:]), np.float32)
        for row, scene in enumerate(scenes):
            for slot, actor in enumerate(scene.actors):
                told[row, slot] = disc(actor, self.config.latent_shape[2])
        return Captions(**self.words(scenes), coverage=torch.from_numpy(told)).to(self.device)


def for_clip(pictures: Tensor) -> Tensor:
    """uint8 [...,3,px,px], normalised as CLIP wants it."""
    mean, std = (torch.tensor(each, device=pictures.device)[:, None, None] for each in (CLIP_MEAN, CLIP_STD))
    return (pictures.float() / 255 - mean) / std


def disc(actor: Actor, side: int) -> np.ndarray:
    """Roughly how much of every latent cell a disc in an actor's place covers, float32 [F,side,side]."""
    cell = 64.0 / side
    track = actor.track()
    axis = (np.arange(side, dtype=np.float32) + 0.5) * cell
    dx, dy = axis[None, None, :] - track[:, 0, None, None], axis[None, :, None] - track[:, 1, None, None]
    inside = 0.5 + (0.85 * track[:, 2, None, None] - np.hypot(dx, dy)) / cell
    covered = inside.clip(0, 1)
    return np.concatenate([covered[:1], covered[1:].reshape(-1, 4, side, side).mean(1)])


def _by_latent_frame(visible: Tensor) -> Tensor:
    """[B,N,F,8,8] of every video frame in 0..1 -> uint8 [B,N,1+(F-1)/4,8,8]."""
    rest = visible[:, :, 1:].unflatten(2, (-1, 4)).mean(3)
    return (torch.cat([visible[:, :, :1], rest], 2) * 255).round().to(torch.uint8)


class Pool:
    """The clips that are there at a step, which follow from a seed and the step alone.

    ``draw(number)`` gives what ``Artist.draw`` gives of one block.
    """

    def __init__(self, draw: Callable[[int], dict[str, Tensor]], config: ModelConfig, supply: Supply) -> None:
        self.supply = supply
        self._draw, self._have = draw, -1
        self._held: dict[str, Tensor] = {}
        self.mean, self.deviation = (
            torch.tensor(config.vae[name])[:, None, None, None] for name in ("latents_mean", "latents_std")
        )

    def at(self, step: int) -> None:
        """Have the clips of a step: draw what is not there yet."""
        newest = self.supply.blocks - 1 + step // self.supply.every
        for number in range(max(self._have + 1, newest - self.supply.blocks + 1), newest + 1):
            block, place = self._draw(number), number % self.supply.blocks
            for name, value in block.items():
                if name not in self._held:
                    shape = self.supply.blocks * self.supply.size, *value.shape[1:]
                    self._held[name] = torch.empty(shape, dtype=value.dtype, device=value.device)
                self._held[name][place * self.supply.size : (place + 1) * self.supply.size] = value
        self._have = newest

    def batch(self, rng: np.random.Generator, size: int, dropped: Dropped) -> Batch:
        """A random batch, slots in random order, some captions and concepts left out.

        Clips of up to ``FEW`` concepts and of more have batches of their own, in proportion: slots that
        nobody fills cost as much as the others.
        """
        few = self._held["label_mask"].any(-1).sum(1).cpu().numpy() <= FEW
        clips = np.flatnonzero(few if rng.random() < few.mean() else ~few)
        return self.of(clips[rng.integers(len(clips), size=size)], rng, dropped)

    def of(self, clips: np.ndarray, rng: np.random.Generator, dropped: Dropped) -> Batch:
        """The batch of the clips of these numbers [B]."""
        return collate(self._held, clips, rng, dropped, (self.mean, self.deviation))


def collate(
    held: dict[str, Tensor],
    clips: np.ndarray,
    rng: np.random.Generator,
    dropped: Dropped,
    scale: tuple[Tensor, Tensor],
) -> Batch:
    """The batch of the clips of these numbers [B]; ``scale``: mean and deviation that latents are brought to
    0 and 1 from."""
    size = len(clips)
    device = held["latents"].device
    rows = torch.from_numpy(clips).to(device)
    filled = held["label_mask"][rows].any(-1)  # [B,N]
    slots = int(filled.sum(1).max())
    lots = torch.from_numpy(rng.random((size, MAX_CONCEPTS))).to(device) + 2.0 * ~filled
    order = lots.argsort(1)[:, :slots]  # the filled ones in any order, as many slots as are needed
    which = torch.from_numpy(rng.integers(REFERENCES, size=(size, slots))).to(device)
    chance = torch.from_numpy(rng.random(size)).to(device)
    both = chance < dropped.both
    no_concepts = both | ((chance >= dropped.both) & (chance < dropped.both + dropped.concepts))
    edge = dropped.both + dropped.concepts
    no_caption = both | ((chance >= edge) & (chance < edge + dropped.caption))
    spread = rows[:, None]
    label_mask = held["label_mask"][spread, order]
    token_ids, token_mask = held["token_ids"][rows].clone(), held["token_mask"][rows].clone()
    token_ids[no_caption], token_mask[no_caption] = 0, False
    token_ids[no_caption, 0], token_mask[no_caption, 0] = 1, True  # the end of an empty sentence
    mean, deviation = (each.to(device) for each in scale)
    return Batch(
        (held["latents"][rows].float() - mean) / deviation,
        (held["decoys"][rows].float() - mean) / deviation,
        token_ids,
        token_mask,
        for_clip(held["references"][spread, order, which]),
        held["label_ids"][spread, order],
        label_mask,
        label_mask.any(-1) & ~no_concepts[:, None],
        held["coverage"][spread, order].float() / 255,
        held["portraits"][spread, order].float() / 127.5 - 1,
    )
