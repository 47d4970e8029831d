"""A scene as a request: its reference pictures with their labels, and the true video to compare with."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from conceptmaster.examples.sprites.training.batches import frame_boxes
from conceptmaster.runtime.request import Concept

from . import drawing, grounds
from .atlas import Atlas
from .scenes import Scene

PICTURE = 128
"""Side of a reference picture in pixels."""
FAINT = 0.05
"""Of a pixel a concept that covers less is not there."""
PAINTINGS = 4
"""Paintings of every background that true videos have; none of them was trained on."""


def references(scene: Scene, atlas: Atlas) -> list[np.ndarray]:
    """One picture per concept, uint8 [128,128,3], on a ground of its own; the same for the same scene."""
    cast, dressed = _dressed(scene, atlas)
    generator = torch.Generator().manual_seed(scene.seed % (1 << 62))
    pictures = drawing.references(dressed, cast.stretch, generator, PICTURE)
    return list(pictures.permute(0, 2, 3, 1).numpy())


def concepts(scene: Scene, pictures: Sequence[np.ndarray]) -> tuple[Concept, ...]:
    """The scene's labels, each with a picture, in order."""
    return tuple(Concept(actor.label, picture) for actor, picture in zip(scene.actors, pictures, strict=True))


def drawn_boxes(scene: Scene, atlas: Atlas) -> np.ndarray:
    """Of each concept the box of what is drawn of it in every frame, x0, y0, x1, y1 in fractions of the
    picture, float64 [N,F,4]."""
    cast, dressed = _dressed(scene, atlas)
    found = []
    for actor, picture, stretch in zip(scene.actors, dressed, cast.stretch, strict=True):
        track = torch.from_numpy(actor.track())
        many = picture.expand(len(track), -1, -1, -1)
        alpha = drawing.place(many, track, stretch.expand(len(track)), drawing.PIXELS)[:, 3]  # [F,S,S]
        found.append(frame_boxes((alpha > FAINT)[:, None, None].double())[0][:, 0, 0])
    return torch.stack(found).double().numpy()


def true_video(scene: Scene, atlas: Atlas) -> np.ndarray:
    """What a perfect model would make of a scene, uint8 [17,128,128,3]."""
    cast, dressed = _dressed(scene, atlas)
    stage = drawing.Stage.of([scene], PAINTINGS)
    video, _ = drawing.clips(dressed, cast.stretch, stage, _paintings())
    return drawing.to_bytes(video[0]).permute(1, 2, 3, 0).numpy()


def _dressed(scene: Scene, atlas: Atlas) -> tuple[drawing.Cast, torch.Tensor]:
    cast = drawing.cast_of([scene])
    return cast, drawing.dress(torch.from_numpy(atlas.tiles), cast)


@functools.cache
def _paintings() -> torch.Tensor:
    return torch.from_numpy(grounds.banks(1, drawing.PIXELS, PAINTINGS))
