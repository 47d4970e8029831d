"""What there is in the sprites world: nouns, identities, scenes and the sentences that tell them.

Everything is drawn from a seed. An identity (colours, texture, accessory) is never told in words. Identities
are split by a hash of their look, quantised: a look that is judged never occurs in training, nor does any
look in the same cell.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .identity import Identity
from .shapes import PAINTERS

SIZE = 64
"""Side of a frame in pixels; trajectories are told in these pixels."""
FRAMES = 17
FPS = 8.0
MAX_CONCEPTS = 3
"""Concepts in a scene of this world; the model has room for one more."""

NOUNS: tuple[str, ...] = tuple(PAINTERS)
TEXTURES = ("plain", "stripes", "dots", "checks", "rings")
ACCESSORIES = ("none", "hat", "crown", "bow")
MOTIONS = ("left", "right", "up", "down", "still", "jump")
ORDINALS = ("first", "second", "third")

PLACES = {
    (0, 0): "at the top left",
    (1, 0): "at the top",
    (2, 0): "at the top right",
    (0, 1): "on the left",
    (1, 1): "in the middle",
    (2, 1): "on the right",
    (0, 2): "at the bottom left",
    (1, 2): "at the bottom",
    (2, 2): "at the bottom right",
}
MOTION_WORDS = {
    "left": ("moves left", "goes left", "runs left", "rolls left"),
    "right": ("moves right", "goes right", "runs right", "rolls right"),
    "up": ("moves up", "goes up", "runs up", "flies up"),
    "down": ("moves down", "goes down", "runs down", "falls down"),
    "still": ("stays still", "does not move", "waits"),
    "jump": ("jumps", "hops"),
}
BACKGROUNDS = {
    "wall": "in front of a plain wall",
    "meadow": "in a meadow",
    "beach": "on a beach",
    "night": "under a night sky",
    "sunset": "at sunset",
    "floor": "on a checkered floor",
    "paper": "on striped paper",
    "hills": "in the hills",
}

TRAVEL = 20.0
"""Pixels that a moving sprite covers in a clip."""
JUMP = 15.0
CELL = 20.0
JITTER = 1.5
MIN_DISTANCE = 19.0
"""Least distance in pixels between the centres of two sprites, over the whole clip."""
PERIODS = 0.52, 0.8
"""Least and greatest period of a texture, in sprite units."""
HAT = 1.4
"""How far a sprite reaches upwards with what it wears, in sprite units."""
ASTRAY = 0.3
"""Share of places that are told at random where they are told loosely; the others are left out."""
MIN_COLOUR_DISTANCE = 0.45
"""Least Euclidean distance (RGB, 0..1) between the body colours of two concepts of one scene."""


@dataclass(frozen=True)
class Actor:
    """One concept of a scene: what it is, how it looks, where it starts (pixels) and how it moves."""

    noun: str
    label: str
    identity: Identity
    radius: float
    start: tuple[float, float]
    cell: tuple[int, int]
    motion: str

    def path(self, frames: int = FRAMES, motion: str | None = None) -> np.ndarray:
        """Centres over time, float32 [frames, 2] as (x, y) in pixels; ``motion`` asks for another one."""
        t = np.linspace(0.0, 1.0, frames, dtype=np.float32)
        motion = motion or self.motion
        dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(motion, (0, 0))
        x = self.start[0] + dx * TRAVEL * t
        y = self.start[1] + dy * TRAVEL * t
        if motion == "jump":
            y = y - JUMP * 4 * t * (1 - t)
        return np.stack([x, y], axis=1)

    def boxes(self) -> np.ndarray:
        """Where it is in each frame, with its hat: x0, y0, x1, y1 in fractions of the picture, [F,4]."""
        top = 1.0 if self.identity.accessory == "none" else HAT
        reach = self.radius * np.array([-1.0, -top, 1.0, 1.0])
        return ((np.tile(self.path(), 2) + reach) / SIZE).clip(0, 1)


@dataclass(frozen=True)
class Scene:
    """A clip to be drawn and the sentence that tells it."""

    caption: str
    actors: tuple[Actor, ...]
    background: str
    seed: int


def random_identity(rng: np.random.Generator, held_out: bool) -> Identity:
    """Draw a look from the asked side of the split."""
    while True:
        hue = rng.random()
        hue2 = (hue + rng.uniform(0.22, 0.78)) % 1.0
        identity = Identity(
            body=colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 1.0), rng.uniform(0.55, 1.0)),
            second=colorsys.hsv_to_rgb(hue2, rng.uniform(0.3, 1.0), rng.uniform(0.6, 1.0)),
            accent=colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.6, 1.0), rng.uniform(0.6, 1.0)),
            texture=str(rng.choice(TEXTURES)),
            period=float(rng.uniform(*PERIODS)),
            angle=float(rng.uniform(0, np.pi)),
            accessory=str(rng.choice(ACCESSORIES)),
        )
        if identity.held_out == held_out:
            return identity


def _inside(path: np.ndarray, radius: float) -> bool:
    return bool((path > radius - 3).all() and (path < SIZE - radius + 3).all())


def _place_actors(
    rng: np.random.Generator, nouns: list[str], labels: list[str], looks: list[Identity]
) -> list[Actor]:
    cells = list(PLACES)
    while True:
        actors: list[Actor] = []
        for noun, label, look in zip(nouns, labels, looks, strict=True):
            for _ in range(30):
                cell = cells[rng.integers(len(cells))]
                centre = [SIZE / 2 + (cell[k] - 1) * CELL + rng.uniform(-JITTER, JITTER) for k in (0, 1)]
                actor = Actor(
                    noun,
                    label,
                    look,
                    radius=float(rng.uniform(9.5, 11.5)),
                    start=(centre[0], centre[1]),
                    cell=cell,
                    motion=MOTIONS[rng.integers(len(MOTIONS))],
                )
                path = actor.path()
                apart = all(np.hypot(*(path - other.path()).T).min() >= MIN_DISTANCE for other in actors)
                if apart and _inside(path, actor.radius):
                    actors.append(actor)
                    break
            else:
                break
        if len(actors) == len(nouns):
            return actors


def _article(label: str) -> str:
    if label.split()[0] in ORDINALS:
        return f"the {label}"
    return f"a {label}"


def tell(
    rng: np.random.Generator,
    actors: Sequence[Actor],
    background: str,
    plainly: bool = False,
    cells: Sequence[tuple[int, int] | None] | None = None,
) -> str:
    """The sentence of a scene; ``plainly`` takes the first wording of every phrase and leaves nothing out.
    cells: places to be told in the place of the actors' own, None for none."""
    parts = []
    for number, actor in enumerate(actors):
        words = MOTION_WORDS[actor.motion]
        verb = words[0] if plainly else words[rng.integers(len(words))]
        cell = actor.cell if plainly or cells is not None or rng.random() < 0.93 else None
        cell = cell if cells is None else cells[number]
        place = "" if cell is None else f" {PLACES[cell]}"
        parts.append(f"{_article(actor.label)}{place} {verb}")
    if len(parts) > 2:
        sentence = ", ".join(parts[:-1]) + " and " + parts[-1]
    else:
        sentence = " and ".join(parts)
    if plainly or rng.random() < 0.9:
        sentence += f", {BACKGROUNDS[background]}"
    return sentence


def tell_loosely(rng: np.random.Generator, actors: Sequence[Actor], background: str) -> str:
    """The sentence of a scene whose places boxes tell: it leaves them out, or tells others."""
    places = list(PLACES)
    cells = [places[rng.integers(len(places))] if rng.random() < ASTRAY else None for _ in actors]
    return tell(rng, actors, background, cells=cells)


def random_scene(
    seed: int,
    *,
    held_out: bool,
    concepts: int | None = None,
    same_noun: bool | None = None,
    plainly: bool = False,
) -> Scene:
    """Draw the scene of a seed.

    ``concepts`` is 1..3 or None for any; ``same_noun`` True makes the first two share their noun, None leaves
    it to chance. Raises ValueError for impossible wishes.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 1 if held_out else 0]))
    count = concepts if concepts is not None else int(rng.choice([1, 2, 3], p=[0.2, 0.55, 0.25]))
    if not 1 <= count <= MAX_CONCEPTS:
        raise ValueError(f"a scene of this world has 1 to {MAX_CONCEPTS} concepts, not {count}")
    twins = same_noun if same_noun is not None else bool(count > 1 and rng.random() < 0.35)
    if twins and count < 2:
        raise ValueError("two concepts of the same noun need at least 2 concepts")
    nouns = [str(n) for n in rng.choice(NOUNS, size=count, replace=False)]
    if twins:
        nouns[1] = nouns[0]
    labels = []
    for index, noun in enumerate(nouns):
        rank = nouns[:index].count(noun)
        labels.append(f"{ORDINALS[rank]} {noun}" if nouns.count(noun) > 1 else noun)
    looks: list[Identity] = []
    while len(looks) < count:
        look = random_identity(rng, held_out)
        if all(np.linalg.norm(np.subtract(look.body, other.body)) >= MIN_COLOUR_DISTANCE for other in looks):
            looks.append(look)
    actors = _place_actors(rng, nouns, labels, looks)
    # told in any order, so that the order of concepts carries nothing
    order = rng.permutation(count)
    actors = [actors[i] for i in order]
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(tell(rng, actors, background, plainly), tuple(actors), background, seed)
