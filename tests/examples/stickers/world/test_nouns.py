import pytest

from conceptmaster.examples.stickers.world.nouns import Noun, copies, nouns_of, spelled, usable
from conceptmaster.examples.stickers.world.sets import Source


def source(*names, aliases=None, characters=None):
    return Source(dict.fromkeys(names, ""), aliases or {}, {}, characters or {})


@pytest.mark.parametrize(
    "name, kind, expected",
    [
        ("fox", "Animals", True),
        ("flag-france", "Flags", False),
        ("woman-running-dark-skin-tone", "People", False),
        ("a-button", "Symbols", False),
        ("red-heart", "Symbols", True),
        ("clock3oclock", "Objects", False),
        ("keycap-3", "Objects", False),
        ("alarm-clock", "Objects", True),
        ("firefox-nightly", "Extras", False),
    ],
)
def test_what_is_no_picture_of_a_thing_is_left_out(name, kind, expected):
    assert usable(name, kind) is expected


def test_copies_in_other_skin_tones_are_known_by_the_name_that_they_copy():
    assert copies("leg-medium-dark", {"leg"}) and copies("leg-light", {"leg-default"})
    assert not copies("traffic-light", {"lemon"})


def test_names_run_together_are_cut_into_known_words():
    words = frozenset({"teddy", "bear", "sun", "flower"})
    assert spelled("teddybear", words, {}) == "teddy bear"
    assert spelled("sunflower", words, {"sunflower": "sunflower"}) == "sunflower"
    assert spelled("unheardof", words, {}) == "unheardof"
    assert spelled("silhouetteofjapan", words, {}) is None


def test_names_of_one_picture_or_code_point_are_one_noun():
    sources = {
        "a": source("fox-face", characters={"fox-face": "1f98a"}),
        "b": source("fox", characters={"fox": "1f98a"}, aliases={"reynard": "fox"}),
        "c": source("fox"),
    }
    found, nouns = nouns_of(sources)
    assert nouns == [Noun("fox", ("fox face", "reynard"))]
    assert set(found.values()) == set(nouns)


def test_pictures_that_are_called_as_their_code_points_are_of_the_noun_that_others_give_these():
    codes = ["1f98a", "1f98a-1f3fb", "1f004", "1f3db-fe0f"]
    sources = {
        "a": source("fox", "hall", characters={"fox": "1f98a", "hall": "1f3db"}),
        "shaded": source(*codes, characters={code: code.replace("-fe0f", "") for code in codes}),
    }
    found, nouns = nouns_of(sources)
    assert [noun.name for noun in nouns] == ["fox", "hall"]
    assert {name: found[title, name].name for title, name in found if title == "shaded"} == {
        "1f98a": "fox",
        "1f3db-fe0f": "hall",
    }


def test_about_every_tenth_noun_is_held_out_and_always_the_same():
    held = [Noun(f"thing {k}", ()).held_out for k in range(2000)]
    assert 160 < sum(held) < 240
    assert Noun("moon", ()).held_out and not Noun("apple", ()).held_out
