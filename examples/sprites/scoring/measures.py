"""Whether a video shows what its request asked for, judged from the frames alone.

Every measure is a contest of hypotheses about one concept: each is painted as a template along a told path,
and the template with the least error wins. The error of a template is the mean squared RGB difference (0..1)
to the frames over its own pixels: its opacity, less what actors drawn later hide. All hypotheses may shift as
a whole, by the same search: one offset for the clip, up to ``SEARCH`` pixels each way. Pixels outside the
frame do not count, and a hypothesis of which less than ``MIN_VISIBLE`` is seen is out of the contest.

=================  ============================================================================  ============
measure            the concept wins when, in its told place,                                     chance
=================  ============================================================================  ============
``pair_binding``   its identity beats those of all other concepts of the request                 1 / concepts
``identity``       its identity beats ``RIVALS`` random ones, held out too                       1 / 9
``noun``           its noun beats all others of the world, in its identity's colours             1 / 14
``texture``        its texture beats the other kinds, in the same colours                        1 / 5
``motion``         its told motion beats the others from the same start                          1 / 6
=================  ============================================================================  ============

Nouns have different outlines, and a small shape would fit inside a large one. So they are compared over one
and the same disk around the path, each painted on the video's own background: the median of the frames where
no told sprite is near, carried on into what is never free.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..world.draw import REACH, look_of, paint_along
from ..world.scenes import FRAMES, MOTIONS, NOUNS, SIZE, TEXTURES, Identity, Scene, random_identity

MEASURES = ("pair_binding", "identity", "noun", "texture", "motion")
SEARCH = 3
"""How far, in pixels, a template may be shifted."""
RIVALS = 8
DISK = 1.25
"""Radius of the disk in which nouns are compared, in sprite radii."""
MIN_VISIBLE = 1 / 3
SUBPIXEL = 256
"""Templates are painted on a grid of 1/256 pixel, so that a steady motion needs only a few paintings."""

_SHIFTS = np.arange(-SEARCH, SEARCH + 1)


class Windows:
    """The w×w pixels around each point of a path [F, 2] (x, y); they may lie outside the frame.

    ``rows`` [F, w, 1] and ``columns`` [F, 1, w] are their places in the frame.
    """

    def __init__(self, path: np.ndarray, radius: float) -> None:
        self.path, self.radius = path.astype(np.float64), radius
        self.half = int(np.ceil(REACH * radius)) + 1
        span = np.arange(-self.half, self.half + 1)
        corner = np.floor(self.path).astype(int)
        self.columns = corner[:, :1, None] + span  # [F, 1, w]
        self.rows = corner[:, 1:, None] + span[:, None]  # [F, w, 1]

    def paint(self, noun: str, identity: Identity, look: float) -> tuple[np.ndarray, np.ndarray]:
        """The sprite, never cut off: premultiplied rgb [F, w, w, 3] and alpha [F, w, w]."""
        within = np.floor((self.path % 1.0) * SUBPIXEL) / SUBPIXEL
        places, index = np.unique(within, axis=0, return_inverse=True)
        size = 2 * self.half + 1
        rgb, alpha = paint_along(noun, identity, self.radius, places + self.half, look, size)
        return rgb[index.reshape(-1)], alpha[index.reshape(-1)]

    def sample(self, layer: np.ndarray) -> np.ndarray:
        """What a layer [F, H, W, ...] holds there, [F, w, w, ...]; zero outside the frame."""
        frames = np.arange(len(self.path))[:, None, None]
        return _border(layer)[frames, _inside(self.rows), _inside(self.columns)]

    def disk(self, radius: float) -> np.ndarray:
        """1 within ``radius`` pixels of the path, else 0, [F, w, w]."""
        x, y = self.path[:, 0, None, None], self.path[:, 1, None, None]
        return (np.hypot(self.columns + 0.5 - x, self.rows + 0.5 - y) <= radius).astype(np.float32)


class Contest:
    """n hypotheses over one set of windows, ready to be held against any number of videos.

    Args: weights [n, F, w, w]: how much each pixel counts; colours [n, F, w, w, 3]: what it should be; full
    [n]: the sum of weights of which ``MIN_VISIBLE`` must lie in the frame.

    The weighted squared difference to a pixel f is linear in (f, |f|², 1): the errors of all hypotheses at
    all 7×7 offsets are one matrix product.
    """

    def __init__(self, windows: Windows, weights: np.ndarray, colours: np.ndarray, full: np.ndarray) -> None:
        n = len(weights)
        used = np.flatnonzero(weights.any(0))  # [p], the pixels that any hypothesis looks at
        times = np.arange(FRAMES)[:, None, None]
        places = np.broadcast_arrays(times, windows.rows, windows.columns)
        times, rows, columns = (place.reshape(-1)[used] for place in places)
        self.starts = times * (SIZE + 2) ** 2  # [p]
        self.rows = _inside(rows + _SHIFTS[:, None]) * (SIZE + 2)  # [7, p]
        self.columns = _inside(columns + _SHIFTS[:, None])
        weight = weights.reshape(n, -1, 1)[:, used]  # [n, p, 1]
        colour = colours.reshape(n, -1, 3)[:, used]  # [n, p, 3]
        square = (colour * colour).sum(-1, keepdims=True)
        factors = np.concatenate([-2 * weight * colour, weight, weight * square], axis=2)  # [n, p, 5]
        self.factors = factors.reshape(n, -1)
        frame = _border(np.ones((FRAMES, SIZE, SIZE, 1), np.float32))
        seen = self._look_up(frame) @ weight[..., 0].T  # [49, n]
        self.seen = np.where(seen >= MIN_VISIBLE * full, seen, 0.0)

    def errors(self, video: np.ndarray) -> np.ndarray:
        """The error of every hypothesis at its best offset, [n]; infinite where it is out of the contest.

        ``video``: what ``prepare`` gives.
        """
        sums = self._look_up(video) @ self.factors.T  # [49, n]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.seen > 0, sums / self.seen, np.inf).min(0)

    def _look_up(self, layer: np.ndarray) -> np.ndarray:
        """What each offset compares in a bordered layer [F, H+2, W+2, c]: [49, p*c]."""
        index = self.starts + self.rows[:, None] + self.columns[None]  # [7, 7, p]
        return np.take(layer.reshape(-1, layer.shape[-1]), index, axis=0).reshape(len(_SHIFTS) ** 2, -1)


class Judge:
    """All contests of a scene; paints its hypotheses once and judges any number of videos."""

    def __init__(self, scene: Scene) -> None:
        self.actors = [_JudgedActor(scene, index) for index in range(len(scene.actors))]
        self.free = np.ones((FRAMES, SIZE, SIZE), bool)  # no told sprite is near
        x = np.arange(SIZE) + 0.5
        for actor in scene.actors:
            px, py = actor.path().T[..., None, None]  # [F, 1, 1] each
            self.free &= np.hypot(x - px, x[:, None] - py) > REACH * actor.radius + 1

    def __call__(self, frames: np.ndarray) -> dict[str, list[bool]]:
        """Who wins in the frames, uint8 [17, 64, 64, 3].

        Returns for each of ``MEASURES`` one entry per concept, in the scene's order; none for
        ``pair_binding`` of a single concept. Raises ValueError for frames of another shape or type.
        """
        if frames.dtype != np.uint8 or frames.shape != (FRAMES, SIZE, SIZE, 3):
            found = f"{frames.dtype} {list(frames.shape)}"
            raise ValueError(f"frames must be uint8 [{FRAMES}, {SIZE}, {SIZE}, 3], not {found}")
        video = frames.astype(np.float32) / 255
        prepared, background = prepare(video), estimate_background(video, self.free)
        won = [actor.judge(prepared, background) for actor in self.actors]
        return {measure: [w[measure] for w in won if measure in w] for measure in MEASURES}

    def margins(self, frames: np.ndarray) -> list[float]:
        """By how much every concept's own look fits better in its place than those of the others of the
        request: the mean of (other - own) / (other + own) over their errors, -1..1, 0 where both fit alike. A
        scene has two concepts or more; frames as for a call."""
        prepared = prepare(frames.astype(np.float32) / 255)
        return [actor.margin(prepared) for actor in self.actors]


class _JudgedActor:
    """The contests about one actor of a scene; in each, the truth is hypothesis 0."""

    def __init__(self, scene: Scene, index: int) -> None:
        self.actor = actor = scene.actors[index]
        clear = [
            1 - paint_along(a.noun, a.identity, a.radius, a.path(), look_of(a.motion))[1]
            for a in scene.actors
        ]
        everything = np.ones_like(clear[0])
        # by those drawn later, and by all others: [F, H, W]
        self.hidden = 1 - np.prod([everything, *clear[index + 1 :]], axis=0)
        covered = 1 - np.prod([everything, *clear[:index], *clear[index + 1 :]], axis=0)

        rng = np.random.Generator(np.random.Philox(key=[scene.seed, 17 + index]))
        others = [other.identity for other in scene.actors if other is not actor]
        rivals = [random_identity(rng, held_out=True) for _ in range(RIVALS)]
        textures = [replace(actor.identity, texture=t) for t in TEXTURES if t != actor.identity.texture]
        self.windows = Windows(actor.path(), actor.radius)
        self.looks = self._over_masks(
            self.windows, [actor.identity, *others, *rivals, *textures], actor.motion
        )
        bounds = np.cumsum([1, len(others), RIVALS, len(textures)])
        self.groups = {
            name: slice(start, stop)
            for name, start, stop in zip(
                ("pair_binding", "identity", "texture"), bounds[:-1], bounds[1:], strict=True
            )
            if stop > start
        }
        self.motions = [
            self._over_masks(Windows(actor.path(motion=motion), actor.radius), [actor.identity], motion)
            for motion in MOTIONS
            if motion != actor.motion
        ]
        nouns = [actor.noun, *(noun for noun in NOUNS if noun != actor.noun)]
        self.nouns = [self.windows.paint(noun, actor.identity, look_of(actor.motion)) for noun in nouns]
        self.disk = self.windows.disk(DISK * actor.radius) * (1 - self.windows.sample(covered))

    def _over_masks(self, windows: Windows, looks: list[Identity], motion: str) -> Contest:
        """A contest of looks, each over its own pixels less what later actors hide."""
        painted = [windows.paint(self.actor.noun, look, look_of(motion)) for look in looks]
        rgb, alpha = (np.stack(parts) for parts in zip(*painted, strict=True))
        colours = rgb / np.maximum(alpha, 1e-6)[..., None]
        return Contest(windows, alpha * (1 - windows.sample(self.hidden)), colours, alpha.sum((1, 2, 3)))

    def _over_disk(self, background: np.ndarray) -> Contest:
        """The contest of nouns, painted on a background [H, W, 3]."""
        ground = self.windows.sample(np.broadcast_to(background, (FRAMES, *background.shape)))
        colours = np.stack([rgb + (1 - alpha[..., None]) * ground for rgb, alpha in self.nouns])
        weights = np.broadcast_to(self.disk, colours.shape[:-1])
        return Contest(self.windows, weights, colours, weights.sum((1, 2, 3)))

    def margin(self, video: np.ndarray) -> float:
        """See ``Judge.margins``; a look that is out of the contest counts as infinitely wrong."""
        errors = self.looks.errors(video)
        own, others = errors[0], errors[self.groups["pair_binding"]]
        with np.errstate(invalid="ignore"):
            part = np.where(np.isinf(others), 1.0, (others - own) / (others + own))
        return float(np.where(np.isinf(own), -1.0, part).mean())

    def judge(self, video: np.ndarray, background: np.ndarray) -> dict[str, bool]:
        """What this actor wins in a prepared video; ``pair_binding`` only where there are others."""
        errors = self.looks.errors(video)
        nouns = self._over_disk(background).errors(video)
        won = {name: bool((errors[0] < errors[group]).all()) for name, group in self.groups.items()}
        won["motion"] = all(bool(errors[0] < motion.errors(video)[0]) for motion in self.motions)
        won["noun"] = bool((nouns[0] < nouns[1:]).all())
        return won


def prepare(video: np.ndarray) -> np.ndarray:
    """Frames [F, H, W, 3] in 0..1 as (r, g, b, r²+g²+b², 1), bordered: [F, H+2, W+2, 5]."""
    square = (video * video).sum(-1, keepdims=True)
    return _border(np.concatenate([video, square, np.ones_like(square)], axis=-1))


def estimate_background(video: np.ndarray, free: np.ndarray) -> np.ndarray:
    """What lies behind the sprites, [H, W, 3]: for each pixel the median of its free frames.

    video: [F, H, W, 3] in 0..1; free: bool [F, H, W], where no sprite is near. A pixel that is never free
    takes the mean of what is known around it. H and W are the same power of two.
    """
    count = free.sum(0)[..., None]  # [H, W, 1]
    ordered = np.sort(np.where(free[..., None], video, np.inf), axis=0)
    middle = np.broadcast_to((np.maximum(count, 1) - 1) // 2, video.shape[1:])
    median = np.take_along_axis(ordered, middle[None], axis=0)[0]
    return _fill(np.where(count > 0, median, 0.0), (count > 0).astype(np.float32))


def _fill(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The image [s, s, 3], unknown pixels (known [s, s, 1] is 0) filled from coarser means of the known."""
    if known.all() or len(known) == 1:
        return image
    total, weight = _halved(image * known), _halved(known)
    coarse = _fill(total / np.maximum(weight, 1), (weight > 0).astype(np.float32))
    return np.where(known > 0, image, coarse.repeat(2, 0).repeat(2, 1))


def _halved(layer: np.ndarray) -> np.ndarray:
    """The sums of 2×2 pixels, [s, s, c] -> [s/2, s/2, c]."""
    half = len(layer) // 2
    return layer.reshape(half, 2, half, 2, -1).sum((1, 3))


def _border(layer: np.ndarray) -> np.ndarray:
    """A layer [F, H, W, ...] with a border of zeros, one pixel wide, standing for all that lies outside."""
    return np.pad(layer, ((0, 0), (1, 1), (1, 1), *[(0, 0)] * (layer.ndim - 3)))


def _inside(index: np.ndarray) -> np.ndarray:
    """Rows or columns of a frame, as those of a bordered layer."""
    return np.clip(index, -1, SIZE) + 1
