"""What happens in a clip: which pictures, under which labels, where they are, how they move.

Everything follows from a seed. A place is told in units of which a frame's side has ``SIDE``, whatever its
pixels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from .atlas import Atlas
from .looks import Look, random_look, shown_colour
from .words import COLOURS, GROUNDS, LOOSE, ORDINALS, PLACES, SIZES, VERBS, colour_name, made_up

SIDE = 64.0
FRAMES = 17
FPS = 8.0
MAX_CONCEPTS = 4
MOTIONS = tuple(VERBS)
TRAVEL, JUMP, ROUND, TREMBLE = 20.0, 15.0, 8.0, 3.0
"""How far a picture goes, jumps, and how far from the middle it circles and shakes."""
TURNS = 1.0
"""Full turns of what spins, clockwise."""
GROWN = 1.6
"""How many times as large as at first what grows is in the end."""
CELL, JITTER = 20.0, 1.5
RADII = {"": (9.5, 12.5), "big": (14.0, 18.0), "small": (6.0, 8.0)}
"""Half the longer side of a picture."""
CLOSE = 0.8
"""Least distance of two pictures' middles, in sums of their radii, over the whole clip."""
COLOUR_APART = 0.35
"""Least distance (RGB, 0..1) of two pictures that are told apart by their colours."""
MADE_UP = 0.2
"""Share of the labels that are made-up words."""
MOST_TRIES = 20
"""Labels that are tried before one is made up."""


@dataclass(frozen=True)
class Wish:
    """What is asked of a scene; None and the shares are left to chance.

    concepts: 1..4. same_noun: the first two share their noun. placed: every caption tells every place (True)
    or none does (False). made_up: every label is a made-up word. plain: the first wording of everything,
    natural looks, canonical nouns; for scoring. foreign: share of the labels that name something else than
    the picture shows.
    """

    split: str = "train"
    concepts: int | None = None
    same_noun: bool | None = None
    placed: bool | None = None
    made_up: bool = False
    plain: bool = False
    foreign: float = 0.05


@dataclass(frozen=True)
class Actor:
    """One concept: which picture of the atlas, its look, the words for it, and what it does.

    ``label`` is what the concept is called, ``said`` how the caption says it, with adjectives; ``radius`` and
    ``start`` in units of ``SIDE``; ``cell`` of ``PLACES``, or None where its place is not told.
    """

    picture: int
    look: Look
    noun: str
    label: str
    said: str
    size: str
    radius: float
    start: tuple[float, float]
    cell: tuple[int, int] | None
    motion: str

    def track(self, motion: str | None = None) -> np.ndarray:
        """Middle, scale and turn over time, float32 [F,4]: x, y in units, half the longer side in units,
        clockwise angle in radians; ``motion`` asks for another one."""
        t = np.linspace(0.0, 1.0, FRAMES)
        motion = motion or self.motion
        x, y = np.full(FRAMES, self.start[0]), np.full(FRAMES, self.start[1])
        radius, angle = np.full(FRAMES, self.radius), np.zeros(FRAMES)
        dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(motion, (0, 0))
        x, y = x + dx * TRAVEL * t, y + dy * TRAVEL * t
        if motion == "jump":
            y = y - JUMP * 4 * t * (1 - t)
        elif motion == "spin":
            angle = 2 * np.pi * TURNS * t
        elif motion == "grow":
            radius = radius * GROWN ** (t - 0.5)
        elif motion == "shrink":
            radius = radius * GROWN ** (0.5 - t)
        elif motion == "shake":
            x = x + TREMBLE * np.sin(2 * np.pi * 4 * t)
        elif motion == "circle":
            x, y = x + ROUND * np.sin(2 * np.pi * t), y + ROUND * (1 - np.cos(2 * np.pi * t)) - ROUND
        return np.stack([x, y, radius, angle], 1).astype(np.float32)


@dataclass(frozen=True)
class Scene:
    """A clip to be drawn: its concepts, each over those before it, its background, and a seed for both."""

    actors: tuple[Actor, ...]
    ground: str
    seed: int
    wish: Wish = field(default_factory=Wish)


def generator(seed: int, stream: int) -> np.random.Generator:
    """The random numbers of a seed; scenes, captions and drawing take streams of their own."""
    return np.random.Generator(np.random.Philox(key=[seed, stream]))


def random_scene(seed: int, atlas: Atlas, wish: Wish) -> Scene:
    """The scene of a seed. Raises ValueError for impossible wishes."""
    rng = generator(seed, 100)
    count = wish.concepts or int(rng.choice([1, 2, 3, 4], p=[0.22, 0.48, 0.22, 0.08]))
    if not 1 <= count <= MAX_CONCEPTS:
        raise ValueError(f"a scene has 1 to {MAX_CONCEPTS} concepts, not {count}")
    twins = bool(count > 1 and rng.random() < 0.3 and any(len(p) > 1 for p in atlas.of(wish.split).values()))
    twins = twins if wish.same_noun is None else wish.same_noun
    if twins and count < 2:
        raise ValueError("two concepts of the same noun need at least 2 concepts")
    nouns, pictures = _choose_pictures(rng, atlas, wish, count, twins)
    looks = [Look() if wish.plain else random_look(rng) for _ in pictures]
    colours = [shown_colour(atlas.colours[p], look) for p, look in zip(pictures, looks, strict=True)]
    placed = wish.placed if wish.placed is not None else wish.plain or bool(rng.random() < 0.8)
    tracks = _place(rng, count, placed, wish)
    labels = _labels(rng, atlas, wish, nouns, pictures, colours, tracks)
    actors = [
        Actor(picture, look, noun, label, said, size, radius, start, cell, motion)
        for picture, look, noun, (label, said), (size, radius, start, cell, motion) in zip(
            pictures, looks, nouns, labels, tracks, strict=True
        )
    ]
    order = rng.permutation(count)  # told in any order, so that the order of concepts carries nothing
    grounds = [*GROUNDS, *(() if wish.plain else COLOURS), *(() if wish.plain else COLOURS[-3:])]
    ground = grounds[int(rng.integers(len(grounds)))]
    return Scene(tuple(actors[i] for i in order), ground, seed, wish)


def _choose_pictures(
    rng: np.random.Generator, atlas: Atlas, wish: Wish, count: int, twins: bool
) -> tuple[list[str], list[int]]:
    """Nouns and pictures; nouns differ, but for twins, the first two, that have one noun and two pictures."""
    by_noun = atlas.of(wish.split)
    names = list(by_noun)
    if len(names) < count:
        raise ValueError(f"there are {len(names)} nouns of the split {wish.split!r}, less than {count}")
    nouns = [names[i] for i in rng.choice(len(names), size=count, replace=False)]
    if twins:
        several = [name for name in names if len(by_noun[name]) > 1 and name not in nouns[2:]]
        if not several:
            raise ValueError(f"no noun of the split {wish.split!r} has two pictures")
        nouns[0] = nouns[1] = several[int(rng.integers(len(several)))]
    pictures: list[int] = []
    for noun in nouns:
        free = [p for p in by_noun[noun] if p not in pictures]
        pictures.append(free[int(rng.integers(len(free)))])
    return nouns, pictures


_Track = tuple[str, float, tuple[float, float], "tuple[int, int] | None", str]


def _place(rng: np.random.Generator, count: int, placed: bool, wish: Wish) -> list[_Track]:
    """Size, radius, start, cell and motion of every actor, apart from each other over the whole clip."""
    cells = list(PLACES)
    while True:
        done: list[_Track] = []
        paths: list[np.ndarray] = []
        for _ in range(count):
            for _ in range(30):
                size = "" if wish.plain else str(rng.choice(["", "big", "small"], p=[0.84, 0.08, 0.08]))
                radius = float(rng.uniform(*RADII[size]))
                told = placed and (wish.placed is True or wish.plain or rng.random() < 0.93)
                cell = cells[int(rng.integers(len(cells)))]
                x, y = (SIDE / 2 + (at - 1) * CELL + float(rng.uniform(-JITTER, JITTER)) for at in cell)
                motion = MOTIONS[int(rng.integers(len(MOTIONS)))]
                start = (x, y)  # told or not: anywhere else is a haze to who makes it in a few steps
                draft = Actor(0, Look(), "", "", "", size, radius, start, None, motion)
                path = draft.track()
                if _inside(path) and all(_apart(path, other) for other in paths):
                    done.append((size, radius, start, cell if told else None, motion))
                    paths.append(path)
                    break
            else:
                break
        if len(done) == count:
            return done


def _inside(path: np.ndarray) -> bool:
    """Whether three quarters of a picture stay in the frame."""
    edge = 0.5 * path[:, 2:3]
    return bool((path[:, :2] > edge).all() and (path[:, :2] < SIDE - edge).all())


def _apart(path: np.ndarray, other: np.ndarray) -> bool:
    distance = np.hypot(*(path - other)[:, :2].T)
    return bool((distance > CLOSE * (path[:, 2] + other[:, 2])).all())


def _labels(
    rng: np.random.Generator,
    atlas: Atlas,
    wish: Wish,
    nouns: list[str],
    pictures: list[int],
    colours: list[np.ndarray],
    tracks: list[_Track],
) -> list[tuple[str, str]]:
    """Label, and how the caption says it, of every actor; no two labels are the same."""
    if len(set(nouns)) < len(nouns):
        pairs = _apart_in_words(rng, wish, nouns, colours, tracks)
    else:
        pairs = [("", noun) for noun in nouns]
    labels: list[tuple[str, str]] = []
    taken: set[str] = set()
    for (before, noun), picture, colour in zip(pairs, pictures, colours, strict=True):
        for tried in itertools.count():
            name = _name(rng, atlas, wish, noun, picture) if not before else noun
            if tried >= MOST_TRIES:  # a noun may be a part of another, and have no other name
                name = made_up(rng)
            label = f"{before} {name}".strip()
            if not before and not wish.plain and not wish.made_up and rng.random() < 0.15:
                label = f"{_adjective(rng, colour)} {name}"
            if label not in taken and not any(f" {label} " in f" {other} " for other in taken):
                break
        taken.add(label)
        said = label
        if not wish.plain and rng.random() < 0.12:
            said = f"{_adjective(rng, colour)} {label}"
        labels.append((label, said))
    return labels


def _apart_in_words(
    rng: np.random.Generator,
    wish: Wish,
    nouns: list[str],
    colours: list[np.ndarray],
    tracks: list[_Track],
) -> list[tuple[str, str]]:
    """What stands before every noun, and the noun, where two of them, the first two, are the same."""
    how = "ordinals" if wish.plain else str(rng.choice(["ordinals", "colours", "sides", "names"]))
    pairs = [("", noun) for noun in nouns]
    if wish.made_up or how == "names":
        return [("", "")] * 2 + pairs[2:] if not wish.made_up else [("", "")] * len(nouns)
    words = list(ORDINALS[:2])
    first, second = (colour_name(c) for c in colours[:2])
    if how == "colours" and first != second and np.linalg.norm(colours[0] - colours[1]) > COLOUR_APART:
        words = [first, second]
    across = tracks[0][2][0] - tracks[1][2][0]
    if how == "sides" and abs(across) > SIDE / 4:
        words = ["left", "right"] if across < 0 else ["right", "left"]
    return [(word, nouns[0]) for word in words] + pairs[2:]


def _name(rng: np.random.Generator, atlas: Atlas, wish: Wish, noun: str, picture: int) -> str:
    """What a picture is called: its noun, a synonym, a made-up word, at times something else's noun."""
    if wish.made_up or not noun or (not wish.plain and rng.random() < MADE_UP):
        return made_up(rng)
    if wish.plain:
        return noun
    if rng.random() < wish.foreign:
        return atlas.entries[int(rng.integers(len(atlas.entries)))].noun
    synonyms = atlas.entries[picture].synonyms
    if synonyms and rng.random() < 0.25:
        return synonyms[int(rng.integers(len(synonyms)))]
    return noun


def _adjective(rng: np.random.Generator, colour: np.ndarray) -> str:
    return colour_name(colour) if rng.random() < 0.6 else LOOSE[int(rng.integers(len(LOOSE)))]


__all__ = ["FPS", "FRAMES", "MAX_CONCEPTS", "SIDE", "SIZES", "Actor", "Scene", "Wish", "random_scene"]
