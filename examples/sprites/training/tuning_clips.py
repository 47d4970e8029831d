"""What a concept is tuned on: its few pictures as clips of this world, and clips of others of its kind.

A picture becomes a clip as CustomDiffusion's become training pictures: at a random scale and place, with
words for the place, on a ground of the picture's own colour, and, since this is video, moved as its caption
says. The world has no words for sizes, so sizes are the world's own. Clips of the same noun with other looks
are the prior that is preserved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.vae.block_vae import BlockVAE

from ..world.draw import draw_clip
from ..world.scenes import SIZE, random_scene, tell
from .clip_arrays import coverage
from .train_vae import from_bytes

RADIUS = 0.31
"""Of a sprite, in sides of its reference picture: the mean of what ``draw_reference`` draws."""
SEEN = 0.06
"""How far a pixel is from the ground, 0..1, where the thing is."""
GROUND = "wall"
"""The world's background that a picture's plain ground is like."""
FOREGROUND = 3.0
"""Extra weight of the loss where a thing is."""


@dataclass(frozen=True)
class Clips:
    """Clips to learn from: latents [n,Cz,F,H,W] (normalised), captions, and how much each latent position
    counts, [n,1,F,H,W]."""

    latents: Tensor
    captions: list[str]
    weight: Tensor


def picture_clips(
    name: str, pictures: Sequence[np.ndarray], count: int, seed: int, config: ModelConfig, vae: BlockVAE
) -> Clips:
    """Clips of one concept. name: what captions call it; pictures: uint8 [H,W,3] each, square. Only what lies
    within a picture counts."""
    videos, captions, weights = [], [], []
    for index in range(count):
        rng = np.random.Generator(np.random.Philox(key=[seed, 1 + index]))
        scene = random_scene(int(rng.integers(2**40)), held_out=False, concepts=1)
        actor = replace(scene.actors[0], label=name)
        frames, inside, thing = _pasted(pictures[index % len(pictures)], actor.radius, actor.path())
        videos.append(frames)
        captions.append(tell(rng, [actor], GROUND))
        cells = coverage(torch.from_numpy(np.stack([inside, thing])[None])).float()[0] / 255  # [2,F,H,W]
        weights.append(cells[:1] * (1 + FOREGROUND * cells[1:]))
    return Clips(_encoded(videos, config, vae), captions, torch.stack(weights))


def class_clips(noun: str, count: int, seed: int, config: ModelConfig, vae: BlockVAE) -> Clips:
    """Clips of this world in which something of that noun is, alone or among others, of looks that are
    trained on."""
    videos, captions, weights = [], [], []
    for index in range(count):
        rng = np.random.Generator(np.random.Philox(key=[seed, index]))
        scene = random_scene(int(rng.integers(2**40)), held_out=False, same_noun=False)
        actors = list(scene.actors)
        if noun not in [actor.noun for actor in actors]:
            actors[0] = replace(actors[0], noun=noun, label=noun)
        scene = replace(scene, actors=tuple(actors))
        video, masks = draw_clip(scene)
        videos.append(video)
        captions.append(tell(rng, actors, scene.background))
        cells = coverage(torch.from_numpy(masks[None])).float()[0] / 255  # [N,F,H,W]
        weights.append(1 + FOREGROUND * cells.sum(0, keepdim=True).clamp(max=1))
    return Clips(_encoded(videos, config, vae), captions, torch.stack(weights))


def _pasted(
    picture: np.ndarray, radius: float, path: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture along a path of centres [F,2]: frames uint8 [F,64,64,3] on its own ground; what lies within
    the picture, and within the thing on it, float32 [F,64,64] each."""
    side = max(8, round(radius / RADIUS))
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    ground = np.median(edge, axis=0)
    small = Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)
    far = np.abs(np.asarray(small, np.float32) - ground).max(-1) > 255 * SEEN
    layers = [small, Image.new("L", small.size, 255), Image.fromarray((far * 255).astype(np.uint8))]
    found: list[list[np.ndarray]] = [[], [], []]
    for x, y in path:
        shift = 1, 0, side / 2 - x, 0, 1, side / 2 - y
        for layer, kept in zip(layers, found, strict=True):
            empty = tuple(int(c) for c in ground) if layer.mode == "RGB" else 0
            moved = layer.transform(
                (SIZE, SIZE), Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR, fillcolor=empty
            )
            kept.append(np.asarray(moved))
    frames, inside, thing = (np.stack(kept) for kept in found)
    return frames, inside.astype(np.float32) / 255, thing.astype(np.float32) / 255


@torch.no_grad()
def _encoded(videos: Sequence[np.ndarray], config: ModelConfig, vae: BlockVAE) -> Tensor:
    numbers = [config.vae["latents_mean"], config.vae["latents_std"]]
    mean, std = torch.tensor(numbers).view(2, 1, -1, 1, 1, 1)
    parts = torch.from_numpy(np.stack(videos)).split(8)
    return (torch.cat([vae.encode(from_bytes(part)) for part in parts]).float() - mean) / std
