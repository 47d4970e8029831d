"""Names by what a caption tells of places and motions."""

from __future__ import annotations

import numpy as np
import pytest

from conceptmaster.examples.data.nouns import choose
from conceptmaster.examples.data.taxonomy import Taxonomy
from conceptmaster.examples.data.telling import Told, assign, cost, told
from conceptmaster.examples.sprites.world.scenes import PLACES, random_scene


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat on the left moves right", Told(0.2, None, (1, 0))),
        ("a cat at the top right flies up", Told(0.8, 0.2, (0, -1))),
        ("a cat in the middle does not move", Told(0.5, 0.5, (0, 0))),
        ("a cat jumps. At the top is the sky", Told(None, None, None)),
        ("the cat sleeps to the left of a ball at the top, the cat waits", Told(0.2, None, (0, 0))),
    ],
)
def test_what_is_told_is_read(caption: str, expected: Told) -> None:
    nouns, _ = choose(caption, Taxonomy.read(), None)
    assert told(caption, nouns[0], nouns) == expected


def test_scenes_are_read_as_they_were_meant() -> None:
    """By another way than the words: the scene itself."""
    taxonomy = Taxonomy.read()
    ways = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0), "jump": None}
    for seed in range(40):
        scene = random_scene(seed, held_out=False, same_noun=False, plainly=True)
        nouns, _ = choose(scene.caption, taxonomy, None)
        assert [noun.label for noun in nouns] == [actor.noun for actor in scene.actors]
        for noun, actor in zip(nouns, scene.actors, strict=True):
            found = told(scene.caption, noun, nouns)
            assert found.way == ways[actor.motion], scene.caption
            for at, side in zip(actor.cell, (found.across, found.down), strict=True):
                assert side in ((0.2, 0.5, 0.8)[at], None) and (side is not None or at == 1), PLACES[
                    actor.cell
                ]


def test_costs_are_of_places_and_ways() -> None:
    left, right = np.array([0.2, 0.5]), np.array([0.8, 0.5])
    assert cost(Told(0.2, None, (1, 0)), left, right) == pytest.approx(0)
    assert cost(Told(0.8, None, (-1, 0)), left, right) == pytest.approx(0.6 + 0.5)
    assert cost(Told(None, None, (0, 0)), left, left) == 0 < cost(Told(None, None, (0, 0)), left, right)
    assert cost(Told(None, None, None), left, right) == 0


def test_only_clear_assignments_are_made() -> None:
    clear = np.array([[0.0, 0.9], [0.8, 0.1]])
    assert assign(clear, 0.2) == ({0: 0, 1: 1}, {})
    assert assign(np.zeros((2, 2)), 0.2)[0] == {}
    assert assign(np.zeros((1, 1)), 0.2) == ({0: 0}, {})  # one noun, one thing: nothing speaks against it
    assert assign(np.full((1, 1), 0.9), 0.2)[1] == {0: "the caption tells another place or motion"}
    found, why = assign(np.array([[0.0], [0.8]]), 0.2)
    assert (found, why) == ({0: 0}, {1: "does not move"})
    assert assign(np.zeros((1, 0)), 0.2) == ({}, {0: "nothing moves"})
    assert assign(np.zeros((9, 9)), 0.2)[0] == {}
