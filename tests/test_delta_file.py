"""Delta files: what is written is read, and whatever is none is told in a line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from conceptmaster.delta_file import FORMAT, Delta, read_delta, write_delta
from conceptmaster.errors import InputError

NAME = "transformer.blocks.0.attn2.to_k.weight"
ABOUT = {"format": FORMAT, "injection": "none", "bases": json.dumps({"transformer": "0" * 64})}
SOUND = {"words.<fox-1>": np.ones(4, np.float32), NAME: np.ones((2, 2), np.float16)}


def test_what_is_written_is_read(tmp_path):
    words = {"<b_2>": np.arange(4, dtype=np.float32), "<fox-1>": np.ones(4, np.float32)}
    delta = Delta(tmp_path / "a.safetensors", "none", {"transformer": "0" * 64}, words, {NAME: SOUND[NAME]})
    write_delta(delta.path, delta)
    found = read_delta(delta.path)
    assert (found.path, found.injection, found.bases) == (delta.path, "none", delta.bases)
    assert list(found.words) == list(words) and list(found.changes) == [NAME]
    assert all(np.array_equal(found.words[word], words[word]) for word in words)
    assert found.of("transformer").keys() == {"blocks.0.attn2.to_k.weight"}


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        (SOUND, {}, "is no delta: its format is None"),
        (SOUND, {"bases": "[]"}, "does not say what it was made for"),
        (SOUND, {"bases": "{}"}, "does not say which weights it was made for"),
        ({NAME: SOUND[NAME]}, None, "has 0 words, it must have 1 to 64"),
        ({**SOUND, "words.fox": np.ones(4, np.float32)}, None, "has the word 'fox': write <name>"),
        ({**SOUND, "words.<fox-1>": np.ones((1, 4), np.float32)}, None, "has no embedding for <fox-1>"),
        (
            {**SOUND, "transformer.proj_out.weight": np.ones(3, np.float32)},
            None,
            "changes transformer.proj_out",
        ),
        ({**SOUND, NAME: np.ones((2, 2), np.int64)}, None, "int64 in .*, not floating point"),
        ({**SOUND, NAME: np.full((2, 2), np.nan, np.float32)}, None, "not finite"),
    ],
)
def test_what_is_no_delta(tmp_path, tensors, about, message):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata=about if about == {} else ABOUT | (about or {}))
    with pytest.raises(InputError, match=message) as error:
        read_delta(path)
    assert "\n" not in str(error.value)


def test_pickles_other_files_and_none(tmp_path):
    for name, content in {"a.bin": b"x", "b.safetensors": b"\x80\x04", "c.safetensors": b""}.items():
        (tmp_path / name).write_bytes(content)
    for name, message in {
        "a.bin": "is a pickle, which can run code",
        "b.safetensors": "is no readable safetensors file",
        "c.safetensors": "is no readable safetensors file",
        "d.safetensors": "cannot read the delta .*No such file",
        ".": "cannot read the delta",
    }.items():
        with pytest.raises(InputError, match=message):
            read_delta(tmp_path / name)
