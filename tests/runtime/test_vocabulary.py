"""What a request is warned of, and that a right one is not."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conceptmaster.errors import InputError, RequestWarning
from conceptmaster.runtime.bundle_format import manifest as manifests
from conceptmaster.runtime.bundle_format.schema import Manifest, Ranges, Vocabulary
from conceptmaster.runtime.bundle_format.source_record import SourceRecord
from conceptmaster.runtime.cleaning import clean
from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.request import Concept, Request
from conceptmaster.runtime.tokenizer import Tokenizer
from conceptmaster.runtime.vocabulary import remarks

WORLD = Vocabulary(
    words=("a", "the", "and", "first", "second"),
    labels=("flower", "rocket", "cat"),
    phrases={"places": ("on the left", "at the top left"), "motions": ("moves up", "waits")},
)
CAPTION = "a flower on the left waits and a rocket at the top left moves up"


@pytest.fixture(scope="module")
def known(bundle: Path) -> Manifest:
    """The fake bundle's manifest, of a bundle that knows WORLD."""
    ranges = Ranges(steps=(2, 50), guidance=(1, 3), concepts=(0, 2))
    old = manifests.load(bundle)
    return dataclasses.replace(
        old, format=3, source=SourceRecord("weights", ()), vocabulary=WORLD, ranges=ranges
    )


def said(manifest: Manifest, prompt: str, *labels: str, read: Callable = clean, **options: object) -> str:
    request = Request(prompt, tuple(Concept(label, "x.png") for label in labels), **options)  # type: ignore[arg-type]
    return "\n".join(remarks(request.resolve(manifest)[0], manifest, read))


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        (CAPTION, ()),
        (CAPTION, ("flower", "rocket")),
        (CAPTION, ("a flower", "rocket")),
        ("A cat on the left waits.", ("cat",)),  # a capital and a full stop do no harm
        ("the first cat waits; the second cat moves up", ("second cat", "first cat")),
        ("the first cat waits and the second cat moves up", ("cat", "first cat")),  # one is left for `cat`
        ("a&nbsp;cat waits", ("cat",)),
        ("a <cat-1> cat waits", ("cat",)),  # a word that a delta brings
    ],
)
def test_a_right_request_is_not_warned_of(known: Manifest, prompt: str, labels: tuple[str, ...]) -> None:
    assert said(known, prompt, *labels) == ""


@pytest.mark.parametrize(
    ("label", "spelling"),
    [
        ("Flower", "flower"),
        ("ROCKET", "rocket"),
        ("pink flower", "flower"),
        ("my old flower", "flower"),
        ("flowers", "flower"),
        ("roket", "rocket"),
        ("first flower", "flower"),
        ("the rocket", "rocket"),
        ("flower and rocket", "flower"),
    ],
)
def test_a_label_that_is_not_in_the_caption_is_told_with_what_is(
    known: Manifest, label: str, spelling: str
) -> None:
    right = "" if label == "flower and rocket" else f" it says {spelling!r}"
    text = said(known, CAPTION, label)
    assert f"the label {label!r} is not in the caption as the model reads it:{right}" in text
    open_world = dataclasses.replace(known, vocabulary=Vocabulary(open=True))
    assert said(open_world, CAPTION, label) == text.splitlines()[0]  # what it says of labels, and no more
    assert said(dataclasses.replace(known, vocabulary=None), CAPTION, label) == text.splitlines()[0]


def test_a_label_is_read_as_the_model_reads_it(known: Manifest) -> None:
    assert said(known, CAPTION, "Flower", read=lambda text: clean(text).lower()) == ""
    assert "'Flower' is not" in said(known, CAPTION, "Flower")
    anything = dataclasses.replace(known, vocabulary=None, ranges=None)
    for prompt, label in (
        ("猫が草の上を走る", "猫"),  # no spaces between words
        ("Zwei Füchse, ein Hase", "hase"),
        ("the red-haired girl's dog", "dog"),
        ("the red-haired girl's dog", "girl"),
        ('a "robot" dances', "robot"),
    ):
        assert bool(said(anything, prompt, label)) == (label == "hase"), label
    assert "it says 'Hase'" in said(anything, "Zwei Füchse, ein Hase", "hase")
    assert "is not in the caption" in said(anything, "a football rolls", "ball")
    assert "caption's own word for a thing" in said(anything, "the car and the bus", "the dog")


def test_a_text_is_read_as_its_tokenizer_changes_it(tmp_path: Path) -> None:
    path, words = tmp_path / "tokenizer.json", {"<pad>": 0, "</s>": 1, "a": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.save(str(path))
    assert Tokenizer(path).read(" A&nbsp;CAT ﬁsh ") == "A CAT fish"  # ligatures are undone for all
    change = tokenizers.normalizers
    tokenizer.normalizer = change.Sequence([change.NFKC(), change.Lowercase(), change.Replace(" ", "▁")])
    tokenizer.save(str(path))
    assert Tokenizer(path).read(" A&nbsp;CAT x²") == "a cat x2"


def test_two_labels_need_two_places(known: Manifest) -> None:
    text = said(known, "the first cat waits", "cat", "first cat")
    assert text == (
        "the labels 'first cat' and 'cat' stand for the same words of the caption, which must name two things"
    )


def test_unknown_words_are_named_with_the_nearest_or_all_things(known: Manifest) -> None:
    text = said(known, "a Flower waits and a banana moves up", "banana")
    assert text == (
        "the model does not know 'Flower' (it knows 'flower'), 'banana'; "
        "the things it knows are flower, rocket, cat; `conceptmaster inspect` lists its places, motions"
    )
    assert "'🎈'" in said(known, "a 🎈 waits") and "'cat-like'" in said(known, "a cat-like rocket waits")
    assert said(known, "a cat waits", "waits") == (
        "the label 'waits' names none of the things that the model knows: flower, rocket, cat"
    )
    many = said(known, " ".join(f"w{i}" for i in range(40)))
    assert "'w19', …;" in many and "'w20'" not in many


def test_words_that_mean_something_only_together(known: Manifest) -> None:
    assert said(known, "a cat on the top left moves left") == (
        "the model knows 'on', 'top', 'left', 'moves' only in whole wordings, such as 'on the left', "
        "'at the top left', 'moves up'"
    )


def test_numbers_out_of_range(known: Manifest) -> None:
    assert said(known, "a cat waits", steps=400, guidance=10.0) == (
        "steps: 400 is outside of what the model was made for, 2 to 50\n"
        "guidance: 10 is outside of what the model was made for, 1 to 3"
    )
    assert "steps: 1 is" in said(known, "a cat waits", steps=1)
    three = said(known, CAPTION + " and a cat waits", "flower", "rocket", "cat")
    assert three == "concepts: 3 is outside of what the model was made for, 0 to 2"


def test_labels_that_the_model_does_not_read_are_not_looked_at(make_bundle: Callable[..., Path]) -> None:
    silent = manifests.load(make_bundle(labels=False))
    assert said(silent, "a ball", "no such thing") == ""


def test_warnings_name_the_line_that_asked_and_strict_refuses(bundle: Path, pictures) -> None:
    pipe = Pipeline.from_bundle(bundle, threads=1)
    concepts, request = [Concept("Ball", pictures["ball"])], Request("a ball", steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        video = pipe("a ball rolls", concepts, steps=1)
        pipe.generate(dataclasses.replace(request, concepts=tuple(concepts)))
        assert pipe("a ball", [Concept("ball", pictures["ball"])], steps=1).warnings == ()
    line = "the label 'Ball' is not in the caption as the model reads it: it says 'ball'"
    assert [str(each.message) for each in caught] == [line, line] and video.warnings == (line,)
    assert {(each.category, each.filename) for each in caught} == {(RequestWarning, __file__)}
    pipe.backend.run = lambda *_: pytest.fail("computed something")  # type: ignore[method-assign]
    with pytest.raises(InputError, match="the label 'Ball' is not.*strict"):
        pipe("a ball rolls", concepts, steps=1, strict=True)


def test_a_hostile_vocabulary_costs_no_time(known: Manifest) -> None:
    words = tuple(f"{'ab' * (i % 12)}{i}" for i in range(19_990))
    huge = dataclasses.replace(known, vocabulary=Vocabulary(words=words, labels=("cat",)))
    assert "does not know" in said(huge, " ".join("ab" * 11 + str(i) for i in range(48)), "cat" * 80)
    with pytest.raises(ValueError, match="20000 entries at most"):
        Vocabulary(words=tuple(map(str, range(20_001))), labels=("cat",))


SOME = st.sampled_from([CAPTION, "a cat waits", "Flower", "!"])
TEXT = SOME | st.text("aAbc-., '\n\\🎈猫ß\u200b", max_size=30)


@given(prompt=TEXT, labels=st.lists(TEXT, max_size=3, unique=True))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_request_gets_lines_of_text(known: Manifest, prompt: str, labels: list[str]) -> None:
    try:
        request = Request(prompt, tuple(Concept(label, "x") for label in labels)).resolve(known)[0]
    except InputError:
        return
    found = remarks(request, known, clean)
    assert len(set(found)) == len(found) and all(line.isprintable() for line in found)
