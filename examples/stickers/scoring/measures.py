"""Whether a video shows what its request asked for, judged from the frames alone.

Every measure is a contest of hypotheses about one concept. Each hypothesis is a painting of the whole clip:
one picture, moved along one track, on the background that the video itself shows where no concept is told.
All are held against the frames over the same region, everything that any of them covers, less what other
concepts cover; the one with the least mean squared difference wins. All may be shifted as a whole by the same
search, up to ``SEARCH`` pixels each way. It is judged at half the video's size.

=================  =========================================================================  ============
measure            the concept wins when, in its told place,                                  chance
=================  =========================================================================  ============
``pair_binding``   its picture beats those of all other concepts of the request               1 / concepts
``identity``       its picture beats ``RIVALS`` random ones of other nouns, of its own set    1 / 9
``motion``         its told motion beats the others from the same start                       1 / 11
``visible``        anywhere in the frame, its picture beats the same rivals, each at its      1 / 9
                   best place and size; for captions that tell no place
``placed``         of the first, middle and last frame, where most of its picture is found,   (without
                   its middle is inside of its box; where boxes tell the places               boxes)
=================  =========================================================================  ============
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conceptmaster.examples.sprites.scoring.measures import estimate_background

from ..world.atlas import Atlas
from ..world.drawing import PIXELS, Cast, dress, place
from ..world.looks import Look
from ..world.requesting import drawn_boxes
from ..world.scenes import FRAMES, MOTIONS, SIDE, Actor, Scene, generator

MEASURES = ("pair_binding", "identity", "motion")
ANYWHERE = ("visible",)
"""What is asked where captions tell no places."""
IN_BOXES = ("placed", *MEASURES)
"""What is asked where boxes tell them."""
HALF = PIXELS // 2
APART = (FRAMES - 1) // 2
"""Frames between those in which a picture is looked for anywhere."""
SEARCH = 3
"""How far, in pixels of ``HALF``, hypotheses may be shifted."""
RIVALS = 8
REACH = 1.3
"""How far from its middle a picture may reach, in radii, whatever its turn and stretch."""
SIZES = (7.5, 8.5, 9.5, 10.25, 11.0, 11.75, 12.5, 13.5, 15.0)
"""Radii at which a picture is looked for anywhere."""
COARSE, CLOSER = 2, ((1.0, 0.05), (0.5, 0.03), (0.25, 0.02))
"""Pixels between the places where it is looked for; how far, and by which share of its size, it is then
moved about the best of them."""
LEAST_INSIDE = 0.6
"""Least share of a picture that lies in the frame where it is looked for."""
LEAST_CHANGE = 0.015
"""Squared difference to a background below which what a picture changes is little evidence."""


class Judge:
    """All contests of a scene; paints its pictures once and judges any number of videos."""

    def __init__(self, scene: Scene, atlas: Atlas, placed: bool = True, boxed: bool = False) -> None:
        self.scene, self.placed = scene, placed
        self.boxes = drawn_boxes(scene, atlas) if boxed else None  # [N,F,4]
        rng = generator(scene.seed, 104)
        actors = scene.actors
        self.rivals = [rivals_of(actor, atlas, rng) for actor in actors]
        pictures = [actor.picture for actor in actors] + [p for rivals in self.rivals for p in rivals]
        looks = [actor.look for actor in actors] + [Look()] * (RIVALS * len(actors))
        cast = Cast.of(pictures, looks)
        tiles = torch.from_numpy(atlas.tiles[pictures])
        numbered = Cast(torch.arange(len(pictures)), *list(vars(cast).values())[1:])
        self.pictures = F.avg_pool2d(dress(tiles, numbered), 2)  # [p,4,T/2,T/2]
        self.stretch = cast.stretch
        x = np.arange(HALF) + 0.5
        self.free = np.ones((FRAMES, HALF, HALF), bool)
        for actor in actors:
            px, py, radius, _ = actor.track().T[..., None, None]
            self.free &= np.hypot(x - px, x[:, None] - py) > REACH * radius + 1
        self.told = [self._paint(k, actor, actor.motion) for k, actor in enumerate(actors)]

    def __call__(self, frames: np.ndarray) -> dict[str, list[bool]]:
        """Who wins in the frames, uint8 [17,128,128,3]: for each measure one entry per concept, in order.

        No ``pair_binding`` for a single concept; ``visible`` alone where captions tell no places, ``placed``
        where boxes do. Raises ValueError for frames of another shape or type.
        """
        if frames.dtype != np.uint8 or frames.shape != (FRAMES, PIXELS, PIXELS, 3):
            found = f"{frames.dtype} {list(frames.shape)}"
            raise ValueError(f"frames must be uint8 [{FRAMES}, {PIXELS}, {PIXELS}, 3], not {found}")
        video = F.avg_pool2d(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255, 2)  # [F,3,s,s]
        count = len(self.scene.actors)
        if not self.placed:
            return {"visible": [self._visible(video, k) for k in range(count)]}
        ground = estimate_background(video.permute(0, 2, 3, 1).numpy(), self.free)
        behind = torch.from_numpy(ground).permute(2, 0, 1).float()
        won = [self._judge(video, behind, k) for k in range(count)]
        judged = {name: [w[name] for w in won if name in w] for name in MEASURES}
        if self.boxes is not None:
            judged["placed"] = [self._in_its_box(video, k, box) for k, box in enumerate(self.boxes)]
        return judged

    def _paint(self, picture: int, actor: Actor, motion: str) -> Tensor:
        """A picture along an actor's track with a motion, [F,4,s,s]."""
        track = torch.from_numpy(actor.track(motion))
        own = self.pictures[picture].expand(FRAMES, -1, -1, -1)
        return place(own, track, self.stretch[picture].expand(FRAMES), HALF)

    def _judge(self, video: Tensor, behind: Tensor, k: int) -> dict[str, bool]:
        actors = self.scene.actors
        actor = actors[k]
        covered = torch.ones(FRAMES, HALF, HALF)
        for other, painted in enumerate(self.told):
            if other != k:
                covered = covered * (1 - painted[:, 3])
        first = len(actors) + RIVALS * k
        others = [n for n in range(len(actors)) if n != k]
        looks = [*others, *range(first, first + RIVALS)]
        painted = torch.stack([self.told[k], *(self._paint(p, actor, actor.motion) for p in looks)])
        errors = contest(video, painted, behind, covered)
        won = {"identity": bool((errors[0] < errors[1 + len(others) :]).all())}
        if others:
            won["pair_binding"] = bool((errors[0] < errors[1 : 1 + len(others)]).all())
        motions = [motion for motion in MOTIONS if motion != actor.motion]
        painted = torch.stack([self.told[k], *(self._paint(k, actor, motion) for motion in motions)])
        errors = contest(video, painted, behind, covered)
        won["motion"] = bool((errors[0] < errors[1:]).all())
        return won

    def _visible(self, video: Tensor, k: int) -> bool:
        first = len(self.scene.actors) + RIVALS * k
        found = [self._shown(video[::APART], p)[0] for p in [k, *range(first, first + RIVALS)]]
        return found[0] > max(found[1:])

    def _in_its_box(self, video: Tensor, k: int, boxes: np.ndarray) -> bool:
        _, frame, middle = self._shown(video[::APART], k)
        low, high = boxes[APART * frame].reshape(2, 2)
        return bool((low < middle).all() and (middle < high).all())

    def _shown(self, frames: Tensor, picture: int) -> tuple[float, int, np.ndarray]:
        """How much of what a picture changes about its background (the mean around it) is found in frames
        [n,3,s,s], where most is: 1 where the picture is there, about 0 where nothing is. And where: which
        frame, and the picture's middle, x and y in fractions of it.

        It is looked for at every second pixel and some sizes, then about the best of these, ever closer.
        """
        margin = int(np.ceil(REACH * max(SIZES)))
        known = F.pad(torch.cat([frames, torch.ones_like(frames[:, :1])], 1), (margin,) * 4)
        best, frame, where = -float("inf"), 0, [0.0, 0.0, SIZES[0]]  # x, y, radius, in padded pixels
        for radius in SIZES:
            side = 2 * int(np.ceil(REACH * radius)) + 1
            drawn = self._alone(picture, side, [[side / 2, side / 2, radius]])[0]
            shown = _explained(known, drawn, COARSE)  # [n,h,w]
            top = np.unravel_index(int(shown.argmax()), shown.shape)
            if shown[top] > best:
                best, frame = float(shown[top]), int(top[0])
                where = [COARSE * int(top[2]) + side / 2, COARSE * int(top[1]) + side / 2, radius]
        for pixels, scale in CLOSER:
            near = [
                [where[0] + dx * pixels, where[1] + dy * pixels, where[2] * (1 + dr * scale)]
                for dx, dy, dr in product((-1, 0, 1), repeat=3)
            ]
            drawn = self._alone(picture, known.shape[-1], near)
            found = [float(_explained(known[frame : frame + 1], each)) for each in drawn]
            best = max(best, *found)
            where = near[int(np.argmax(found))]
        return best, frame, (np.array(where[:2]) - margin) / HALF

    def _alone(self, picture: int, side: int, tracks: list[list[float]]) -> Tensor:
        """A picture alone, at tracks (x, y, radius) in pixels of a square of ``side``: [n,4,side,side]."""
        told = F.pad(torch.tensor(tracks) * (SIDE / side), (0, 1))
        own = self.pictures[picture].expand(len(told), -1, -1, -1)
        return place(own, told, self.stretch[picture].expand(len(told)), side)


def _explained(known: Tensor, drawn: Tensor, stride: int = 1) -> Tensor:
    """How much of what a picture changes about the mean around it is in frames, at places ``stride`` apart,
    [n,h,w].

    known [n,4,S,S]: colours, and 1 where the frame is; drawn [4,T,T]: colour times alpha, alpha. Minus
    infinity where less than ``LEAST_INSIDE`` of the picture lies in the frame.
    """
    x, inside = known[:, :3], known[:, 3:]
    d, alpha = drawn[:3], drawn[3]  # a frame is d + (1 - alpha) ground where the picture is
    region = (alpha > 0.02).float()  # [T,T]
    clear = region * (1 - alpha)

    def sums(of: Tensor, kernels: Tensor) -> Tensor:
        """Of each channel [n,c,S,S] with each of [k,T,T]: [n,c,k,h,w]."""
        found = F.conv2d(of.flatten(0, 1)[:, None], kernels[:, None], stride=stride)
        return found.unflatten(0, (len(of), -1))

    total, seen, outside = sums(x, torch.stack([region, clear, 1 - region])).unbind(2)  # [n,3,h,w] each
    kernels = torch.stack([region, 1 - region, clear.square(), alpha, d.square().sum(0), *(d * clear)])
    count, free, clears, shown, squares, *mixed = sums(inside, kernels)[:, 0].unbind(1)  # [n,h,w] each
    ground = outside / free.clamp(min=1)[:, None]
    energy = F.conv2d(x.square(), region.expand(1, 3, -1, -1), stride=stride)[:, 0]
    match = F.conv2d(x, d[None], stride=stride)[:, 0]
    empty = energy + (count[:, None] * ground.square() - 2 * ground * total).sum(1)
    behind = (ground.square() * clears[:, None] + 2 * ground * (torch.stack(mixed, 1) - seen)).sum(1)
    own = energy - 2 * match + squares + behind
    found = (empty - own) / (empty + LEAST_CHANGE * shown)
    return found.masked_fill(shown < LEAST_INSIDE * alpha.sum(), -torch.inf)


def contest(video: Tensor, painted: Tensor, behind: Tensor, counted: Tensor) -> Tensor:
    """The errors of hypotheses, each at its best shift, [n].

    video [F,3,s,s], painted [n,F,4,s,s] (colour times alpha, alpha), behind [3,s,s], counted [F,s,s] in 0..1.
    """
    alpha = painted[:, :, 3:]
    region = (alpha[:, :, 0].amax(0) > 0.05) * counted  # [F,s,s]
    clips = painted[:, :, :3] + (1 - alpha) * behind  # [n,F,3,s,s]
    frames, rows, columns = torch.nonzero(region, as_tuple=True)
    weight = region[frames, rows, columns]  # [p]
    wanted = clips[:, frames, :, rows, columns].permute(1, 0, 2)  # [n,p,3]
    factors = torch.cat([weight[:, None] * wanted, weight[:, None].expand(len(wanted), -1, 1)], 2)
    constant = (weight[:, None] * wanted.square()).sum((1, 2))
    known = torch.cat([-2 * video, video.square().sum(1, keepdim=True)], 1)  # [F,4,s,s]
    best = torch.full((len(painted),), torch.inf)
    for down in range(-SEARCH, SEARCH + 1):
        for across in range(-SEARCH, SEARCH + 1):
            at = known[frames, :, (rows + down).clamp(0, HALF - 1), (columns + across).clamp(0, HALF - 1)]
            best = torch.minimum(best, factors.flatten(1) @ at.flatten() + constant)
    return best


def rivals_of(actor: Actor, atlas: Atlas, rng: np.random.Generator) -> list[int]:
    """``RIVALS`` random pictures of other nouns from the set of an actor's picture."""
    own = atlas.entries[actor.picture]
    alike = [n for n, entry in enumerate(atlas.entries) if entry.set == own.set and entry.noun != own.noun]
    return [alike[i] for i in rng.choice(len(alike), RIVALS, replace=len(alike) < RIVALS)]
