"""Requests: what is accepted, what is refused, and that nothing else can happen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conceptmaster.errors import InputError
from conceptmaster.runtime.bundle_format import manifest
from conceptmaster.runtime.request import Concept, Request


def test_defaults_come_from_the_bundle(bundle: Path) -> None:
    found, guidance = Request("a ball").resolve(manifest.load(bundle))
    assert guidance.weights.tolist() == [-1.5, 2.5]
    assert found == Request("a ball", (), "", 4, 2.5, None, "unipc", 3.0, 0, 1)
    kept = Request("a ball", (), "bad", 7, 1.0, None, "euler", 1.0, 3, 2)
    assert kept.resolve(manifest.load(bundle))[0] == kept


def test_numpy_numbers_are_numbers() -> None:
    request = Request("a", steps=np.int64(3), guidance=np.float32(2), shift=2, seed=np.uint8(1))
    assert request == Request("a", steps=3, guidance=2.0, shift=2.0, seed=1)
    assert type(request.steps) is int and type(request.guidance) is float


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": "&nbsp;"}, "prompt is empty"),
        ({"prompt": "&amp;#x20; \u3000"}, "prompt is empty"),
        ({"prompt": None}, "prompt must be a string"),
        ({"prompt": "\udcff"}, "not valid Unicode"),
        ({"concepts": "ball"}, "sequence of Concept"),
        ({"concepts": (("ball", "x.png"),)}, "sequence of Concept"),
        ({"concepts": Concept("ball", "x.png")}, "sequence of Concept"),
        ({"concepts": {"ball": "x.png"}}, "sequence of Concept"),
        ({"concepts": (Concept("a cat", "x"), Concept(" A  CAT", "y"))}, "labels must differ"),
        ({"concepts": (Concept("R&D", "x"), Concept("r&amp;amp;d", "y"))}, "labelled 'r&d': labels"),
        ({"concepts": (Concept("it’s", "x"), Concept("it's", "y"))}, "labels must differ"),
        ({"concepts": (Concept("caf\u00e9", "x"), Concept("cafe\u0301&nbsp;", "y"))}, "labels must differ"),
        ({"negative": 3}, "negative prompt must be a string"),
        ({"steps": 0}, "steps must be 1 to 1000, not 0"),
        ({"steps": 1001}, "steps must be"),
        ({"steps": True}, "steps must be an integer"),
        ({"steps": 2.0}, "steps must be an integer"),
        ({"steps": "2"}, "steps must be an integer"),
        ({"guidance": -0.1}, "guidance must be"),
        ({"guidance": float("nan")}, "guidance must be.*nan"),
        ({"guidance": float("inf")}, "guidance must be.*inf"),
        ({"guidance": 10**400}, "guidance must be"),
        ({"guidance": True}, "guidance must be a number"),
        ({"concept_guidance": -1}, "concept_guidance must be"),
        ({"solver": "magic"}, "unknown solver 'magic'"),
        ({"solver": 1}, "unknown solver 1"),
        ({"shift": 0}, "shift must be"),
        ({"shift": 1e9}, "shift must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
        ({"seed": 2**63 - 1, "samples": 2}, "seed must be"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"samples": 0}, "samples must be 1 to 64"),
        ({"samples": 65}, "samples must be"),
    ],
)
def test_wrong_fields(fields: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        Request(**({"prompt": "a ball"} | fields))


def test_concepts_and_requests_are_equal_by_content() -> None:
    picture, copy = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    other, drawn = np.ones((2, 2, 3), np.uint8), Image.fromarray(picture)
    for image, same in ((picture, copy), (drawn, drawn.copy()), ("x.png", "x.png")):
        assert Concept("a", image) == Concept("a", same)
        assert hash(Concept("a", image)) == hash(Concept("a", same))
    for image in (other, picture[:1], drawn, "x"):
        assert Concept("a", picture) != Concept("a", image)
    assert Concept("a", picture) != Concept("b", picture) and Concept("a", picture) != "a"
    one, two = (Request("a", (Concept("a", array), Concept("b", "x"))) for array in (picture, copy))
    assert one == two and len({one, two}) == 1
    assert one != Request("a", (Concept("a", other), Concept("b", "x")))


@pytest.mark.parametrize("label", ["", "  ", "&nbsp;", None, 3, "\ud800"])
def test_wrong_labels(label: object) -> None:
    with pytest.raises(InputError, match="label"):
        Concept(label, "x.png")  # type: ignore[arg-type]


def write(folder: Path, value: object) -> Path:
    path = folder / "request.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_file_finds_its_pictures_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path, {
        "prompt": "a ball", "concepts": [{"label": "ball", "image": "in/ball.png"},
                                         {"label": "cat", "image": "/cat.png"}],
        "steps": 3, "guidance": 2, "solver": None, "seed": 9,
    })  # fmt: skip
    expected = (Concept("ball", tmp_path / "in/ball.png"), Concept("cat", Path("/cat.png")))
    assert Request.from_json(path) == Request("a ball", expected, steps=3, guidance=2.0, seed=9)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "not JSON"),
        ("[]", "not an object"),
        ("{}", "lacks the key 'prompt'"),
        ({"prompt": None}, "prompt must be a string"),
        ({"prompt": "a", "step": 3}, "unknown key 'step'"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
        ('{"prompt": "a", "guidance": NaN}', "NaN"),
        ('{"prompt": "a", "guidance": 1e999}', "guidance must be"),
        ({"prompt": "a", "seed": "1"}, "seed must be an integer"),
        ({"prompt": "a", "samples": True}, "samples must be an integer"),
        ({"prompt": "a", "concepts": {}}, "must be a list"),
        ({"prompt": "a", "concepts": "ball"}, "must be a list"),
        ({"prompt": "a", "concepts": ["ball"]}, "each concept"),
        ({"prompt": "a", "concepts": [{"label": "a"}]}, "each concept"),
        ({"prompt": "a", "concepts": [{"label": "a", "image": "b", "mask": "c"}]}, "each concept"),
        ({"prompt": "a", "concepts": [{"label": "a", "image": 3}]}, "image must be a path"),
        ({"prompt": "a", "concepts": [{"label": "a", "image": ""}]}, "image must be a path"),
        ({"prompt": "a", "concepts": [{"label": 3, "image": "b"}]}, "label must be a string"),
    ],
)
def test_wrong_files(tmp_path: Path, content: object, word: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=word) as caught:
        Request.from_json(path)
    assert "request.json" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError, match="cannot read the request"):
            Request.from_json(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "prompt",
    "concepts",
    "negative",
    "steps",
    "guidance",
    "solver",
    "shift",
    "seed",
    "samples",
    "label",
    "x",
]


@given(data=st.dictionaries(st.sampled_from(KEYS), VALUES) | VALUES)
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_request_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, data: object
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        assert isinstance(Request.from_json(write(folder, data)), Request)
    except InputError:
        pass
