"""What makes training look at the pictures: scenes whose textures are wrong, and pictures of another noun.

A *decoy* is a scene drawn once more with other textures. Noised clips give their textures away at levels
where a model that generates has drawn none yet; a clip that goes on from its decoy gives away places and
colours alone, and what the texture is must be read off the pictures.

A *foreign* picture shows a concept's look on another noun: the label says what it is, the picture how it
looks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .scenes import NOUNS, PERIODS, TEXTURES, Actor, Identity, Scene

FLAT = 0.4
"""Share of decoys whose bodies are one colour between the look's two: what a blurred texture looks like."""
SECOND = 0.6
"""Most of the second colour in that mixture."""


def decoy(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene, the texture of every concept drawn anew: of any kind, or flat."""
    looks = [_disguised(actor.identity, rng) for actor in scene.actors]
    actors = zip(scene.actors, looks, strict=True)
    return replace(scene, actors=tuple(replace(actor, identity=look) for actor, look in actors))


def _disguised(look: Identity, rng: np.random.Generator) -> Identity:
    if rng.random() < FLAT:
        part = rng.uniform(0, SECOND)
        red, green, blue = ((1 - part) * a + part * b for a, b in zip(look.body, look.second, strict=True))
        return replace(look, texture="plain", body=(red, green, blue))
    return replace(
        look,
        texture=str(rng.choice(TEXTURES)),
        period=float(rng.uniform(*PERIODS)),
        angle=float(rng.uniform(0, np.pi)),
    )


def foreign(actor: Actor, rng: np.random.Generator) -> Actor:
    """The same look on another noun."""
    return replace(actor, noun=str(rng.choice([noun for noun in NOUNS if noun != actor.noun])))
