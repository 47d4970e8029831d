import numpy as np
import pytest

from conceptmaster.examples.stickers.world import words
from conceptmaster.examples.stickers.world.atlas import from_pictures
from conceptmaster.examples.stickers.world.captions import tell
from conceptmaster.examples.stickers.world.looks import Look, random_look, shown_colour
from conceptmaster.examples.stickers.world.scenes import SIDE, Wish, generator, random_scene

from ..small import HELD_OUT, atlas, picture


def scenes(count=60, **wish):
    return [random_scene(seed, atlas(), Wish(**wish)) for seed in range(count)]


def test_a_seed_gives_the_same_scene_and_caption_every_time():
    for one, other in zip(scenes(), scenes(), strict=True):
        assert one == other and tell(one) == tell(other)


def test_every_label_stands_in_its_caption_and_no_two_are_the_same():
    for scene in scenes(200):
        caption = tell(scene).lower()
        labels = [actor.label for actor in scene.actors]
        assert all(label.lower() in caption for label in labels)
        assert len(set(labels)) == len(labels)


def test_a_noun_that_is_a_part_of_another_is_called_something_else():
    """Where plain labels are asked for it has no other name of its own."""
    both = from_pictures([(noun, picture(k)) for k, noun in enumerate(("hat", "straw hat"))], "openmoji")
    wish = Wish(split="sets", concepts=2, same_noun=False, plain=True)
    called = [{actor.label for actor in random_scene(seed, both, wish).actors} for seed in range(12)]
    assert all(len(labels) == 2 and "straw hat" in labels for labels in called)
    assert any("hat" not in labels for labels in called)  # it came second, and is called by a new word


def test_concepts_stay_apart_and_in_the_frame():
    for scene in scenes(concepts=3):
        tracks = [actor.track() for actor in scene.actors]
        for k, track in enumerate(tracks):
            assert (track[:, :2] > 0).all() and (track[:, :2] < SIDE).all()
            for other in tracks[:k]:
                gaps = np.hypot(*(track - other)[:, :2].T)
                assert (gaps > 0.75 * (track[:, 2] + other[:, 2])).all()


def test_twins_have_one_noun_and_two_pictures():
    for scene in scenes(concepts=3, same_noun=True, plain=True):
        nouns = [actor.noun for actor in scene.actors]
        assert len(set(nouns)) == 2
        twins = [actor for actor in scene.actors if nouns.count(actor.noun) == 2]
        assert twins[0].picture != twins[1].picture
        assert {actor.label.split()[0] for actor in twins} == {"first", "second"}


def test_wishes_are_granted():
    assert {len(scene.actors) for scene in scenes(200)} == {1, 2, 3, 4}
    known = {name for entry in atlas().entries for name in (entry.noun, *entry.synonyms)}
    for scene in scenes(concepts=2, made_up=True, plain=True):
        assert not {actor.label for actor in scene.actors} & known
    assert all(actor.cell is None for scene in scenes(placed=False) for actor in scene.actors)
    assert all(actor.cell for scene in scenes(placed=True) for actor in scene.actors)
    assert {actor.look for scene in scenes(plain=True) for actor in scene.actors} == {Look()}
    assert {actor.noun for scene in scenes(split="nouns", concepts=1) for actor in scene.actors} == {
        *HELD_OUT
    }


def test_impossible_wishes_are_refused():
    with pytest.raises(ValueError, match="3 nouns of the split 'nouns', less than 4"):
        random_scene(0, atlas(), Wish(concepts=4, split="nouns"))
    with pytest.raises(ValueError, match="1 to 4 concepts, not 5"):
        random_scene(0, atlas(), Wish(concepts=5))
    with pytest.raises(ValueError, match="at least 2 concepts"):
        random_scene(0, atlas(), Wish(concepts=1, same_noun=True))


def test_colours_are_called_what_they_are():
    said = {
        "red": (0.9, 0.1, 0.1),
        "brown": (0.45, 0.28, 0.1),
        "white": (1, 1, 1),
        "black": (0.05, 0.05, 0.1),
    }
    said |= {
        "pink": (1.0, 0.6, 0.7),
        "blue": (0.1, 0.3, 0.9),
        "green": (0.2, 0.7, 0.2),
        "yellow": (1, 0.9, 0.2),
    }
    assert {name: words.colour_name(rgb) for name, rgb in said.items()} == {name: name for name in said}


def test_a_turned_hue_is_called_by_its_new_name():
    red = np.array([0.9, 0.1, 0.1], np.float32)
    turned = {words.colour_name(shown_colour(red, Look(hue=2 * np.pi / 3 * k))) for k in range(3)}
    assert turned == {"red", "green", "blue"}
    assert np.allclose(shown_colour(red, Look()), red, atol=1e-6)


def test_made_up_words_are_pronounceable_and_hardly_ever_come_back():
    rng = generator(0, 0)
    made = [words.made_up(rng) for _ in range(500)]
    assert len(set(made)) > 450 and all(word.isalpha() and word.islower() for word in made)
    assert {look.pattern for look in (random_look(rng) for _ in range(300))} == {
        "none",
        "stripes",
        "dots",
        "checks",
    }
