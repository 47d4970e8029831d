"""A manifest that somebody made to do harm, with a right checksum: one error of the project's, or a video."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conceptmaster.cli import main
from conceptmaster.errors import BundleError
from conceptmaster.runtime.bundle_format.find import SHIPPED, Bundle
from conceptmaster.runtime.bundle_format.hashed_file import sha256_file
from conceptmaster.runtime.pipeline import Pipeline

FUZZ = """
import json, random, resource, shutil, sys, time, warnings
sys.path.insert(0, sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
warnings.simplefilter("ignore")
from pathlib import Path
from conceptmaster.errors import ConceptMasterError
from conceptmaster.runtime.bundle_format import strict_json
from conceptmaster.runtime.pipeline import Pipeline
folder, rounds = Path(sys.argv[2]), int(sys.argv[3])
base = json.loads((folder / "manifest.json").read_text())
base.pop("checksum")
random.seed(1)
VALUES = [None, True, 0, 1, -1, 2, 3, 7, 10**9, 10**19, 10**400, 1.5, 1e308, 1e-300, "", "a", "x" * 9999,
          "\\x1b[2J", [], {}, [1], [0] * 4, [1] * 4, [10**9] * 4, {"a": 1}, "fp32", "int64", "../x",
          {"places": [{"first": 0, "count": 10**9, "fit": "cut"}], "least": 1, "dropped": 0},
          {"size": [2, 2], "overlap": [1, 1]}, {"words": ["a"], "labels": ["a"]}, {"steps": [1, 10**9]}]

def places(value, found):
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)) and len(found) < 5000:
            places(value[key], found)
    return found

slowest, opened = 0, 0
for number in range(rounds):
    values = json.loads(json.dumps(base))
    graphs = values.pop("graphs") if number % 4 else None  # which are most of a manifest
    for _ in range(random.choice([1, 1, 2])):
        place, key = random.choice(places(values, []))
        if random.random() < 0.1:
            del place[key]
        else:
            place[key] = json.loads(json.dumps(random.choice(VALUES)))
    values |= {} if graphs is None else {"graphs": graphs}
    values["checksum"] = strict_json.checksum(values)
    (folder / "manifest.json").write_text(json.dumps(values))
    start = time.monotonic()
    try:
        pipeline = Pipeline.from_bundle(folder, threads=1)
        opened += 1
        if opened % 8 == 0:
            pipeline("a ball rolls left", steps=1)
    except ConceptMasterError as error:
        assert len(str(error)) < 1000 + len(str(folder)), str(error)[:2000]
    slowest = max(slowest, time.monotonic() - start)
assert slowest < 5, slowest
assert rounds / 20 < opened < rounds, opened
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED / "sprites", tmp_path / "own"))


def test_manifests_changed_at_random(own: Path) -> None:
    root = str(Path(sys.modules["conceptmaster"].__file__ or "").parents[1])
    command = [sys.executable, "-c", FUZZ, root, str(own), "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stderr[-2000:], (own / "manifest.json").read_text()[:3000])


def test_ids_beyond_the_table(own: Path, edit_manifest: Callable) -> None:
    """The tokenizer's are right in themselves: the model of the manifest knows fewer."""
    edit_manifest(own, lambda d: d["model"]["text_encoder"].update(vocab_size=8))
    with pytest.raises(BundleError, match=r"is no tokenizer that is read: it has \d+ entries"):
        Pipeline.from_bundle(own)


def test_a_file_that_is_no_file_or_has_no_end(own: Path, edit_manifest: Callable) -> None:
    place = own / "tokenizer.json"
    with place.open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(BundleError, match="has 1099511627776 bytes, more than 33554432"):
        Bundle.open(own)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(BundleError, match="is missing"):
        Bundle.open(own)


def test_a_tokenizer_that_fails_is_one_line(
    own: Path, edit_manifest: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    place = own / "tokenizer.json"
    for text in ("{}", "[" * 10**6, '{"model": {"type": "WordLevel", "vocab": {"a": 1000000000}}}'):
        place.write_text(text)
        edit_manifest(own, lambda d: d["tokenizer"].update(sha256=sha256_file(place)))
        words = ["generate", "--bundle", str(own), "--prompt", "a", "--output", str(own / "x.npy")]
        assert main(words) == 1
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "is no tokenizer that is read" in error


def test_a_pipe_is_no_noise(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(own / "noise.npy")
    assert main(["generate", "--prompt", "a ball", "--noise", str(own / "noise.npy")]) == 2
    assert "is not a regular file" in capsys.readouterr().err


def test_escapes_in_a_manifest(
    own: Path, edit_manifest: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\u202e"
    edit_manifest(own, lambda d: d.update(name=evil, written_by={evil: evil}))
    assert main(["inspect", str(own)]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07\\u202e" in shown and all(line.isprintable() for line in shown.splitlines())
