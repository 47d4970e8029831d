"""The taxonomy, and which nouns of a caption become concepts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from conceptmaster.errors import InputError
from conceptmaster.examples.data.nouns import choose, spacy_tagger
from conceptmaster.examples.data.taxonomy import KINDS, Taxonomy
from conceptmaster.examples.sprites.world.scenes import NOUNS


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return Taxonomy.read()


def test_there_are_120_classes_of_three_kinds(taxonomy: Taxonomy) -> None:
    assert len(taxonomy.kinds) == 120  # the paper's number
    assert set(taxonomy.kinds.values()) == set(KINDS)
    assert min(Counter(taxonomy.kinds.values()).values()) >= 10
    assert set(NOUNS) <= taxonomy.kinds.keys()  # or drawn videos could not be measured


@pytest.mark.parametrize(
    ("caption", "labels"),
    [
        ("A kitten sleeps.", [("kitten", "cat", "livings")]),
        (
            "a teddy bear sits beside a bear",
            [("teddy bear", "teddy bear", "stuffs"), ("bear", "bear", "livings")],
        ),
        ("The fireman waves; the fireman smiles", [("fireman", "firefighter", "persons")]),
        ("Two dogs and a fish", [("fish", "fish", "livings")]),
        ("the mice, the women, the loaves and the ponies", []),
        ("a big dog chases another small dog", []),
        ("the first cat and the second cat", []),
        ("a carpet, a catalogue, scarcity", []),
        ("nothing is here", []),
    ],
)
def test_one_thing_of_a_class_stays(taxonomy: Taxonomy, caption: str, labels: list[tuple[str, ...]]) -> None:
    kept, _ = choose(caption, taxonomy, None)
    assert [(noun.label, noun.name, noun.kind) for noun in kept] == labels
    assert all(caption[a:b].lower() == noun.label for noun in kept for a, b in noun.places)


def test_what_several_are_is_told(taxonomy: Taxonomy) -> None:
    assert choose("Two dogs run", taxonomy, None)[1] == [("dogs", "several of a class")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat", "before the first"),
        ("[pets]\ncat", "line 1 .* must be one of persons, livings, stuffs"),
        ("[livings]\ncat: pet\ndog: pet", "line 3 .* 'pet' is there already"),
        ("# nothing", "holds no class"),
    ],
)
def test_a_wrong_taxonomy_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        Taxonomy.read(path)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spaCy pipeline that knows a few words' parts of speech by heart: what ships without weights."""
    import spacy

    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("attribute_ruler")
    tags = {"cat": "NOUN", "dog": "NOUN", "meadow": "NOUN", "duck": "VERB", "runs": "VERB", "a": "DET"}
    for word, tag in tags.items():
        ruler.add(patterns=[[{"LOWER": word}]], attrs={"POS": tag})  # type: ignore[attr-defined]
    path = tmp_path_factory.mktemp("spacy") / "model"
    nlp.to_disk(path)
    return path


def test_spacy_says_what_a_noun_is(taxonomy: Taxonomy, pipeline: Path) -> None:
    caption = "a cat sees people duck in a meadow"
    assert {noun.label for noun in choose(caption, taxonomy, None)[0]} == {"cat", "duck"}
    kept, dropped = choose(caption, taxonomy, spacy_tagger(pipeline))
    assert [noun.label for noun in kept] == ["cat"]
    assert set(dropped) == {("duck", "no noun here"), ("meadow", "not in the taxonomy")}


def test_a_folder_that_is_no_spacy_pipeline_is_named(tmp_path: Path, pipeline: Path) -> None:
    import spacy

    with pytest.raises(InputError, match="no config.cfg"):
        spacy_tagger(tmp_path)
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(InputError, match="tags no parts of speech"):
        spacy_tagger(tmp_path / "blank")
    (tmp_path / "config.cfg").write_text("[nlp]\nlang = nowhere\n")
    with pytest.raises(InputError, match="does not load"):
        spacy_tagger(tmp_path)
