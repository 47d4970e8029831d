"""The sentence that tells a scene, in many ways."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .scenes import Actor, Scene, generator
from .words import COLOURS, GROUNDS, ORDINALS, PLACES, PLAIN, SIZES, VERBS, article

DEFINITE = (*ORDINALS, "left", "right", "other")


def tell(scene: Scene, places: bool = True) -> str:
    """The caption of a scene; of a plain one the first wording of everything. places: whether it tells any;
    all else it says alike."""
    rng = generator(scene.seed, 101)
    plain = scene.wish.plain
    style = int(rng.integers(3)) if not plain and rng.random() < 0.3 else 0
    articles = str(rng.choice(["a", "the", "none"], p=[0.7, 0.15, 0.15])) if not plain else "a"
    parts = [_clause(rng, actor, style, articles, plain, places) for actor in scene.actors]
    sentence = _joined(rng, parts, plain)
    if plain or rng.random() < 0.85:
        ground = _ground(rng, scene.ground, plain)
        if not plain and rng.random() < 0.2:
            sentence = f"{ground}{_pick(rng, (', ', ': ', ' '))}{sentence}"
        else:
            sentence += f"{', ' if plain else _pick(rng, (', ', ', ', ' ', '. '))}{ground}"
    return sentence if plain else _cased(rng, sentence)


def _clause(
    rng: np.random.Generator, actor: Actor, style: int, articles: str, plain: bool, places: bool
) -> str:
    who = actor.said
    if actor.size:
        who = f"{_pick(rng, SIZES[actor.size])} {who}"
    first = who.split()[0]
    if articles != "none" and first not in ("my", "our", "the"):
        definite = articles == "the" or first in DEFINITE
        who = f"{'the' if definite else article(who)} {who}"
    verb = VERBS[actor.motion][0] if plain else _pick(rng, VERBS[actor.motion])
    if actor.cell is None:
        return f"{who} {verb}"
    place = PLACES[actor.cell][0] if plain or rng.random() < 0.6 else _pick(rng, PLACES[actor.cell])
    if not places:
        return f"{who} {verb}"
    return (f"{who} {place} {verb}", f"{place} {who} {verb}", f"{who} {verb} {place}")[style]


def _ground(rng: np.random.Generator, ground: str, plain: bool) -> str:
    if ground in COLOURS:
        return _pick(rng, PLAIN).format(ground)
    return GROUNDS[ground][0] if plain else _pick(rng, GROUNDS[ground])


def _joined(rng: np.random.Generator, parts: list[str], plain: bool) -> str:
    last = " and " if plain or rng.random() < 0.6 else _pick(rng, (", ", "; ", ". ", " while ", ", and "))
    return last.join([*([", ".join(parts[:-1])] if parts[1:] else []), parts[-1]])


def _cased(rng: np.random.Generator, sentence: str) -> str:
    kind = rng.random()
    if kind < 0.2:
        sentence = sentence[:1].upper() + sentence[1:]
    elif kind < 0.25:
        sentence = sentence.title()
    elif kind < 0.28:
        sentence = sentence.upper()
    return sentence + ("." if rng.random() < 0.3 else "")


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]
