"""Tokenizers that somebody made to do harm are refused before the library sees them; good ones are read."""

from __future__ import annotations

import base64
import copy
import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conceptmaster.runtime.bundle_format.find import SHIPPED
from conceptmaster.runtime.bundle_format.manifest import load
from conceptmaster.tokenizer_file import check, encode, normalised, read_tokenizer

ADDED = [{"id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
          "normalized": False} for i, text in enumerate(("<pad>", "</s>"))]  # fmt: skip
END = {"SpecialToken": {"id": "</s>", "type_id": 0}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, END],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, END, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
}
WORDS = {text: i for i, text in enumerate(("<pad>", "</s>", "<unk>", "a", "b", "ab", "##b"))}
MODELS: dict[str, dict[str, Any]] = {
    "WordLevel": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<unk>"},
    "WordPiece": {"type": "WordPiece", "vocab": WORDS, "unk_token": "<unk>",
                  "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    "BPE": {"type": "BPE", "vocab": WORDS, "merges": ["a b"], "unk_token": "<unk>"},
    "Unigram": {"type": "Unigram", "unk_id": 2, "vocab": [[text, -1.0] for text in WORDS]},
}  # fmt: skip


def charsmap(leaf: int = 0, target: int = 96, texts: bytes = b"b\0") -> str:
    """What turns "a" into what stands at `leaf` in `texts`: a double-array trie of one letter."""
    units = [0] * 256
    units[97] = (target << 10) | (1 << 8) | 97
    units[97 ^ 96] = (1 << 31) | leaf
    return base64.b64encode(struct.pack("<I256I", 1024, *units) + texts).decode()


def document(model: str = "Unigram") -> dict[str, Any]:
    """A tokenizer.json with some of everything."""
    collapse = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    return copy.deepcopy(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": ADDED,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, collapse]},
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": TEMPLATE,
            "decoder": None,
            "model": MODELS[model],
        }
    )


def refused(values: Any, word: str = ".", known: int | None = 7) -> None:
    data = values if isinstance(values, bytes) else json.dumps(values).encode()
    start = time.monotonic()
    with pytest.raises(ValueError, match=word) as caught:
        check(data, known)
    assert len(str(caught.value)) < 400 and time.monotonic() - start < 60


@pytest.mark.parametrize("model", MODELS)
def test_good_ones_are_read(tmp_path: Path, model: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document(model)))
    tokenizer, text = read_tokenizer(path, 7)
    assert json.loads(text) == document(model)
    assert encode(tokenizer, "ab  a", 7)[0] == 5 and encode(tokenizer, "ab  a", 7)[-1] == 1
    with pytest.raises(ValueError, match="it gives the id 5, the text encoder knows 5"):
        encode(tokenizer, "ab", 5)
    with pytest.raises(ValueError, match="the text encoder knows 6"):
        read_tokenizer(path, 6)


def test_a_compiled_normalizer_is_read_and_does_what_it_says(tmp_path: Path) -> None:
    values = document("WordLevel")
    values["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": charsmap()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer, _ = read_tokenizer(tmp_path / "tokenizer.json", 7)
    assert encode(tokenizer, "a", 7) == (4, 1)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"leaf": 3}, "outside of its texts"),
        ({"leaf": 2**30}, "outside of its texts"),
        ({"target": 2**20}, "points outside"),
        ({"leaf": 1, "texts": "é\0".encode()}, "outside of its texts"),
        ({"texts": b"\xff\0"}, "what is no text"),
        ({"texts": b"b" * 10**6}, "too long texts"),
    ],
)
def test_compiled_normalizers_that_are_refused(arguments: dict[str, Any], word: str) -> None:
    values = document()
    values["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": charsmap(**arguments)}
    refused(values, word)


def _replace(pattern: dict[str, str], content: str = " ") -> Callable[[dict[str, Any]], object]:
    return lambda d: d.update(normalizer={"type": "Replace", "pattern": pattern, "content": content})


def _template(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda d: d["post_processor"].update(changes)


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "no model": ("BPE", lambda d: d.pop("model"), "has no model"),
    "a model of another kind": ("BPE", lambda d: d["model"].update(type="Tiktoken"), "read are BPE"),
    "a model without a kind": ("BPE", lambda d: d["model"].pop("type"), "of the type None"),
    "an empty piece": ("Unigram", lambda d: d["model"]["vocab"].__setitem__(6, ["", 0.0]), "no piece with"),
    "a score of text": ("Unigram", lambda d: d["model"]["vocab"].__setitem__(6, ["x", "y"]), "no piece"),
    "an unknown without a piece": ("Unigram", lambda d: d["model"].update(unk_id=10**9), "unk_id"),
    "ids beyond the table": ("WordLevel", lambda d: d["model"]["vocab"].update(ab=10**9), "not below 7"),
    "a negative id": ("WordLevel", lambda d: d["model"]["vocab"].update(a=-1), "not below 7"),
    "a fraction": ("WordLevel", lambda d: d["model"]["vocab"].update(a=1.5), "not below 7"),
    "too many pieces": ("WordLevel", lambda d: d["model"]["vocab"].update(x=1), "has 8 entries"),
    "an empty word": ("BPE", lambda d: d["model"].update(vocab=WORDS | {"": 6}), "8 entries|empty"),
    "a merge of nothing": ("BPE", lambda d: d["model"].update(merges=[["", "a"]]), "no pair"),
    "a merge without the prefix": (
        "BPE", lambda d: d["model"].update(continuing_subword_prefix="####"), "lacks the prefix"),
    "dropout": ("BPE", lambda d: d["model"].update(dropout=0.5), "dropout"),
    "a long prefix": (
        "WordPiece", lambda d: d["model"].update(continuing_subword_prefix="#" * 10**6), "is no short text"),
    "long words": ("WordPiece", lambda d: d["model"].update(max_input_chars_per_word=10**9), "beyond reason"),
    "an added id": ("BPE", lambda d: d["added_tokens"][0].update(id=10**9), "added token"),
    "an added nothing": ("BPE", lambda d: d["added_tokens"][0].update(content=""), "added token"),
    "many added": ("BPE", lambda d: d.update(added_tokens=d["added_tokens"] * 10**4), "more than 4096"),
    "a pattern that never ends": ("BPE", _replace({"Regex": "(a+)+$"}), "is not read"),
    "a pattern of many": ("BPE", _replace({"Regex": "a+a+a+a+b"}), "is not read"),
    "a pattern that matches nothing": ("BPE", _replace({"Regex": "a*"}), "is not read"),
    "a pattern as large as the memory": ("BPE", _replace({"Regex": "(a{999}){999}"}), "is not read"),
    "an empty text": ("BPE", _replace({"String": ""}), "a pattern is missing"),
    "a text that grows": ("BPE", _replace({"String": "a"}, "aa"), "longer than what it replaces"),
    "a text that goes": ("BPE", _replace({"String": "a"}, ""), "is empty, which the library fails at"),
    "nothing in front": (
        "BPE", lambda d: d.update(normalizer={"type": "Prepend", "prepend": ""}), "prepends nothing"),
    "a start that goes": (
        "BPE", lambda d: d.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
        "strips the start"),
    "no pattern": ("BPE", _replace({}), "a pattern is missing"),
    "a pattern in a decoder": (
        "BPE", lambda d: d.update(decoder={"type": "Replace", "pattern": {"Regex": "(a|a)*"}}), "not read"),
    "chunks of nothing": (
        "BPE", lambda d: d.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "'FixedLength'"),
    "bytes of bytes": (
        "BPE",
        lambda d: d.update(normalizer={"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 20}),
        "20 times ByteLevel"),
    "a token of the template's that is not there": ("BPE", _template(special_tokens={}), "no special token"),
    "many parts": ("BPE", _template(single=[END] * 10**5), "too many parts"),
    "many ids": ("BPE", _template(special_tokens={"</s>": {"id": "</s>", "ids": [1] * 999}}), "too many"),
    "a long text": ("BPE", lambda d: d.update(normalizer={"type": "Prepend", "prepend": "x" * 65}), "longer"),
    "a kind of numbers": ("BPE", lambda d: d.update(normalizer={"type": 3}), "has no type"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "change", "word"), CHANGES.values(), ids=CHANGES)
def test_what_is_refused(model: str, change: Callable[[dict[str, Any]], object], word: str) -> None:
    values = document(model)
    change(values)
    refused(values, word)


def test_a_panic_is_an_error() -> None:
    """Rust's is no Exception; Ctrl-C stays what it is."""

    class Panic(BaseException):
        pass

    class Broken:
        error: BaseException = Panic("index out of bounds")

        @property
        def normalizer(self) -> Broken:
            return self

        def encode(self, _: str) -> None:
            raise self.error

        normalize_str = encode

    broken: Any = Broken()
    with pytest.raises(ValueError, match="the library fails: index out of bounds"):
        encode(broken, "a", 7)
    with pytest.raises(ValueError, match="the library fails: index out of bounds"):
        normalised(broken, "a")
    broken.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        encode(broken, "a", 7)


def test_files_that_are_none() -> None:
    for data in (b"", b"[]", b"{", b'{"a":1,"a":1}', b"[" * 10**6, b"\xff", b'{"model": NaN}'):
        refused(data)
    refused({"model": MODELS["BPE"] | {"vocab": [1]}}, "is no object")
    refused({"model": MODELS["Unigram"] | {"vocab": {"a": 1}}}, "is no list")
    many = json.dumps({"model": MODELS["WordLevel"] | {"vocab": {f"{i}": i for i in range(10**6)}}})
    refused(many.encode(), "has 1000000 entries", 512)


FUZZ = """
import json, random, resource, sys, time
sys.path.insert(0, sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from pathlib import Path
from conceptmaster.tokenizer_file import encode, read_tokenizer
documents, rounds, path = json.loads(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
random.seed(1)
VALUES = [None, True, 0, 1, -1, 6, 7, 10**9, 2**64, 1.5, 1e308, "", "a", " ", "\\u2581", "x" * 300, [], {},
          "##", [["", 0]], {"": 0}, {"a": 10**9}, {"Regex": "(a*)*b"}, {"String": ""}, {"type": "ByteLevel"},
          {"type": "Metaspace", "replacement": "_"}, {"type": "Split", "pattern": {"String": "a"}},
          {"type": "BertProcessing", "sep": ["x", 9], "cls": ["y", 99]}, {"type": "Digits"}]

def places(value, found):
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found

slowest, read = 0, 0
for number in range(rounds):
    values = json.loads(json.dumps(random.choice(documents)))
    for _ in range(random.choice([1, 1, 2, 3])):
        place, key = random.choice(places(values, []))
        if random.random() < 0.15:
            del place[key]
        else:
            place[key] = json.loads(json.dumps(random.choice(VALUES)))
    path.write_text(json.dumps(values))
    start = time.monotonic()
    try:
        tokenizer, _ = read_tokenizer(path, 7)
        ids = [encode(tokenizer, text, 7) for text in ("ab  a", "", "\\u00e9\\u4e2d a##b" * 50, "a" * 3000)]
        assert all(0 <= i < 7 for few in ids for i in few)
        read += 1
    except ValueError:
        pass
    slowest = max(slowest, time.monotonic() - start)
assert slowest < 3, slowest
assert rounds / 50 < read < rounds, read
"""


def test_changed_at_random(tmp_path: Path) -> None:
    """A hang or a crash of the library would end this process, so another one looks."""
    root = str(Path(sys.modules["conceptmaster"].__file__ or "").parents[1])
    documents, path = json.dumps([document(model) for model in MODELS]), tmp_path / "tokenizer.json"
    command = [sys.executable, "-c", FUZZ, root, documents, "800", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stderr[-2000:], path.read_text()[:3000])
    assert done.stderr == ""  # where Rust says that it panics


def test_the_shipped_ones_are_read_soon() -> None:
    for path in SHIPPED.glob("*/tokenizer.json"):
        known = load(path.parent).token_ids
        start = time.monotonic()
        check(path.read_bytes(), known)
        assert time.monotonic() - start < 1
