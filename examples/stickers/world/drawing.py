"""Many scenes at once in PyTorch, on any device: clips, decoys, reference pictures, upright pictures.

Letters: B clips, N concepts of a clip, P pictures of all clips, F frames, S and T side of a frame and a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .atlas import BOX, TILE
from .grounds import KINDS
from .looks import PATTERNS, Look
from .scenes import FRAMES, MAX_CONCEPTS, SIDE, Actor, Scene

PIXELS = 128
"""Side of a frame in pixels."""
SEEN = 64
"""Side of a reference picture in pixels."""
UPRIGHT = 32
"""Side of the picture that a training-only head redraws from the visual queries."""


@dataclass(frozen=True)
class Cast:
    """Pictures and their looks: picture int64 [P], matrix [P,3,3], flip bool [P], stretch [P], pattern int64
    [P], paint [P,3], angle and period [P]; see ``looks.Look``."""

    picture: Tensor
    matrix: Tensor
    flip: Tensor
    stretch: Tensor
    pattern: Tensor
    paint: Tensor
    angle: Tensor
    period: Tensor

    @classmethod
    def of(cls, pictures: list[int], looks: list[Look]) -> Cast:
        """Of pictures of the atlas in these looks."""

        def floats(values: list[object]) -> Tensor:
            return torch.from_numpy(np.asarray(values, np.float32))

        return cls(
            torch.tensor(pictures),
            torch.from_numpy(np.stack([look.matrix() for look in looks])),
            torch.tensor([look.flip for look in looks]),
            floats([look.stretch for look in looks]),
            torch.tensor([PATTERNS.index(look.pattern) for look in looks]),
            floats([look.paint for look in looks]),
            floats([look.angle for look in looks]),
            floats([look.period for look in looks]),
        )

    def to(self, device: str | torch.device) -> Self:
        """The same on a device."""
        return type(self)(*(value.to(device) for value in vars(self).values()))

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """Some of them."""
        return type(self)(*(value[rows] for value in vars(self).values()))


@dataclass(frozen=True)
class Stage:
    """What scenes need beside their cast, which lists the concepts of all of them one after the other.

    row int64 [P] and slot int64 [P]: the scene of a picture, and its number in it. track [P,F,4], see
    ``Actor.track``. ground int64 [B] and painting int64 [B]: of ``grounds.banks``.
    """

    row: Tensor
    slot: Tensor
    track: Tensor
    ground: Tensor
    painting: Tensor

    @classmethod
    def of(cls, scenes: list[Scene], each: int) -> Stage:
        """Of scenes; ``each``: paintings of every background."""
        counts = [len(scene.actors) for scene in scenes]
        return cls(
            torch.repeat_interleave(torch.arange(len(scenes)), torch.tensor(counts)),
            torch.cat([torch.arange(count) for count in counts]),
            torch.from_numpy(np.stack([actor.track() for scene in scenes for actor in scene.actors])),
            torch.tensor([KINDS.index(scene.ground) for scene in scenes]),
            torch.tensor([scene.seed * 7919 % each for scene in scenes]),
        )

    def to(self, device: str | torch.device) -> Self:
        """The same on a device."""
        return type(self)(*(value.to(device) for value in vars(self).values()))


def cast_of(scenes: list[Scene]) -> Cast:
    """The cast of scenes, one after the other."""
    actors: list[Actor] = [actor for scene in scenes for actor in scene.actors]
    return Cast.of([actor.picture for actor in actors], [actor.look for actor in actors])


def dress(tiles: Tensor, cast: Cast) -> Tensor:
    """Pictures in their looks: tiles uint8 [K,T,T,4] of an atlas -> float [P,4,T,T], the colour multiplied by
    the last, alpha. Their stretch is left to ``place``."""
    own = tiles[cast.picture].permute(0, 3, 1, 2).float() / 255  # [P,4,T,T]
    own = torch.where(cast.flip[:, None, None, None], own.flip(3), own)
    rgb = torch.einsum("pij,pjyx->piyx", cast.matrix, own[:, :3]).clamp(0, 1)
    rows = torch.nonzero(cast.pattern)[:, 0]
    if len(rows):
        part = _patterned(cast[rows], tiles.shape[1])[:, None]
        rgb[rows] = rgb[rows] * (1 - part) + cast.paint[rows, :, None, None] * part
    return torch.cat([rgb * own[:, 3:], own[:, 3:]], dim=1)


def _patterned(cast: Cast, side: int) -> Tensor:
    """How much of a pattern's paint lies on every pixel of a tile, [P,T,T]."""
    axis = (torch.arange(side, device=cast.angle.device) + 0.5 - side / 2) / BOX
    c, s = cast.angle.cos()[:, None, None], cast.angle.sin()[:, None, None]
    turn = 2 * torch.pi / cast.period[:, None, None]
    u, v = axis[None, None, :], axis[None, :, None]
    across, along = torch.sin(turn * (c * u + s * v)), torch.sin(turn * (c * v - s * u))
    wave = torch.where(cast.pattern[:, None, None] == 1, across, across * along)
    wave = torch.where(cast.pattern[:, None, None] == 2, wave.abs() - 0.5, wave)
    return (0.5 + 4 * wave).clamp(0, 0.85)


def place(dressed: Tensor, track: Tensor, stretch: Tensor, side: int) -> Tensor:
    """Pictures [P,4,T,T] where they are in square frames: track [P,4] (x, y, half the longer side, turn; the
    frame's side is ``SIDE``) and stretch [P] -> [P,4,side,side], bilinear."""
    x, y, radius, angle = track.unbind(-1)
    c, s, half, fill = angle.cos(), angle.sin(), SIDE / 2, BOX / TILE
    across, down = fill / (radius * stretch), fill * stretch / radius
    dx, dy = half - x, half - y
    theta = torch.stack(
        [
            torch.stack([half * c, half * s, c * dx + s * dy], -1) * across[:, None],
            torch.stack([-half * s, half * c, c * dy - s * dx], -1) * down[:, None],
        ],
        dim=1,
    )  # [P,2,3]
    grid = F.affine_grid(theta, [len(theta), 1, side, side], align_corners=False)
    return F.grid_sample(dressed, grid, align_corners=False)


def clips(
    dressed: Tensor, stretch: Tensor, stage: Stage, paintings: Tensor, side: int = PIXELS
) -> tuple[Tensor, Tensor]:
    """The clips of scenes, float [B,3,F,S,S] in 0..1, and what shows of every concept, [B,N,F,8,8] in 0..1.

    dressed [P,4,T,T], stretch [P], paintings uint8 [K,each,S,S,3]. A later concept lies over an earlier one.
    """
    count = len(stage.ground)
    ground = paintings[stage.ground, stage.painting].permute(0, 3, 1, 2).float() / 255  # [B,3,S,S]
    canvas = ground[:, None].repeat(1, FRAMES, 1, 1, 1)  # [B,F,3,S,S]
    visible = canvas.new_zeros(count, MAX_CONCEPTS, FRAMES, 8, 8)
    for slot in range(int(stage.slot.max()) + 1):
        rows = torch.nonzero(stage.slot == slot)[:, 0]
        where = stage.row[rows]
        many = dressed[rows, None].expand(-1, FRAMES, -1, -1, -1).flatten(0, 1)
        drawn = place(many, stage.track[rows].flatten(0, 1), stretch[rows].repeat_interleave(FRAMES), side)
        drawn = drawn.unflatten(0, (-1, FRAMES))  # [p,F,4,S,S]
        alpha = drawn[:, :, 3:]
        canvas[where] = canvas[where] * (1 - alpha) + drawn[:, :, :3]
        covered = F.adaptive_avg_pool2d(alpha[:, :, 0], 8)  # [p,F,8,8]
        visible[where, :slot] *= 1 - covered[:, None]
        visible[where, slot] = covered
    return canvas.transpose(1, 2), visible


def references(dressed: Tensor, stretch: Tensor, generator: torch.Generator, side: int = SEEN) -> Tensor:
    """Pictures as a user hands them in, alone on plain ground: [P,4,T,T] -> uint8 [P,3,side,side].

    Half of the grounds are white. They are upright: how a picture is held is part of its looks.
    """
    size = len(dressed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand((size, *shape), generator=generator, device=dressed.device)
        return low + (high - low) * drawn

    radius = SIDE / 2 * uniform(0.55, 0.96)
    room = (SIDE / 2 - radius)[:, None]
    middle = SIDE / 2 + room * uniform(-1, 1, 2)
    track = torch.cat([middle, radius[:, None], torch.zeros_like(radius)[:, None]], 1)
    drawn = place(dressed, track, stretch, side)
    pale = 1 - 0.3 * uniform(0, 1, 3)
    ground = torch.where(uniform(0, 1, 1) < 0.6, torch.ones_like(pale), pale)
    ground = torch.where(uniform(0, 1, 1) < 0.15, uniform(0, 1, 3), ground)
    return to_bytes(ground[:, :, None, None] * (1 - drawn[:, 3:]) + drawn[:, :3])


def upright(dressed: Tensor, stretch: Tensor) -> Tensor:
    """Pictures alone on grey, as large as fits: [P,4,T,T] -> uint8 [P,3,UPRIGHT,UPRIGHT]."""
    middle = dressed.new_tensor([SIDE / 2, SIDE / 2, 0.45 * SIDE, 0.0]).expand(len(dressed), -1)
    drawn = F.avg_pool2d(place(dressed, middle, stretch, 2 * UPRIGHT), 2)
    return to_bytes(0.5 * (1 - drawn[:, 3:]) + drawn[:, :3])


def to_bytes(colours: Tensor) -> Tensor:
    """0..1 to uint8."""
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8)
