"""A bundle's way to a node: whole, sound and once, or not at all."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from conceptmaster.errors import BundleError, InputError
from conceptmaster.runtime.bundle_format.find import Bundle
from conceptmaster.runtime.workers import fetch
from conceptmaster.runtime.workers.fetch import Parcel, Source, at_hand


@pytest.fixture
def parcel(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parcel:
    """Of the bundle, where this machine is one that has not got it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return dataclasses.replace(Parcel.of(str(bundle)), place=str(tmp_path / "elsewhere"))


class Wire:
    """Reads from the bundle as a node does; what it has read, and from which read on it fails."""

    def __init__(self, bundle: Path, parcel: Parcel) -> None:
        self.source = Source(dataclasses.replace(parcel, place=str(bundle)))
        self.reads: list[tuple[str, int]] = []
        self.damaged: str | None = None

    async def read(self, name: str, start: int) -> bytes:
        await asyncio.sleep(0)
        self.reads.append((name, start))
        data = self.source.read(name, start)
        return data[::-1] if name == self.damaged else data


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_it_comes_whole_in_pieces_and_once_for_all_who_want_it(
    bundle: Path, parcel: Parcel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PIECE", 1000)
    wire = Wire(bundle, parcel)
    assert at_hand(parcel) is None

    async def twice() -> list[Path]:
        return await asyncio.gather(*(fetch.fetch(parcel, wire.read) for _ in range(2)))

    one, other = asyncio.run(twice())
    assert one == other == at_hand(parcel)
    assert files(one) == {name: (bundle / name).read_bytes() for name in parcel.files}
    assert Bundle.open(one).manifest == Bundle.open(bundle).manifest
    pieces = sum(max(1, -(-size // 1000)) for _, size in parcel.files.values())
    assert len(wire.reads) == len(set(wire.reads)) == pieces


def test_where_it_is_already_it_is_used_in_place(bundle: Path, parcel: Parcel) -> None:
    assert at_hand(dataclasses.replace(parcel, place=str(bundle))) == bundle
    other = dataclasses.replace(parcel, place=str(bundle), digest="0" * 64)
    names = {name: ("0" * 64, size) for name, (_, size) in parcel.files.items()}
    assert at_hand(dataclasses.replace(other, files=names)) is None  # of the same sizes, but another


@pytest.mark.parametrize("name", ["manifest.json", "denoise.onnx"])
def test_what_came_wrong_is_told_and_nothing_of_it_stays(bundle: Path, parcel: Parcel, name: str) -> None:
    wire = Wire(bundle, parcel)
    wire.damaged = name
    with pytest.raises(BundleError, match=rf"'{name}' came with SHA-256 .*it was changed at") as caught:
        asyncio.run(fetch.fetch(parcel, wire.read))
    assert "\n" not in str(caught.value)
    assert at_hand(parcel) is None and list(files(fetch.cache())) == [f"{parcel.digest}.lock"]
    wire.damaged = None
    assert files(asyncio.run(fetch.fetch(parcel, wire.read)))[name] == (bundle / name).read_bytes()


def test_what_was_damaged_there_is_brought_again(bundle: Path, parcel: Parcel) -> None:
    wire = Wire(bundle, parcel)
    folder = asyncio.run(fetch.fetch(parcel, wire.read))
    (folder / "denoise.onnx").write_bytes(b"")
    assert asyncio.run(fetch.fetch(parcel, wire.read)) == folder
    assert (folder / "denoise.onnx").read_bytes() == (bundle / "denoise.onnx").read_bytes()


def test_too_small_a_disk_is_told_before_anything_is_read(
    bundle: Path, parcel: Parcel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(bundle, parcel)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10}))
    with pytest.raises(InputError, match=r"the bundle takes \d+ bytes, and '.*' has 10 left"):
        asyncio.run(fetch.fetch(parcel, wire.read))
    assert wire.reads == []


def test_nothing_but_the_bundle_is_read(bundle: Path) -> None:
    source = Source(Parcel.of(str(bundle)))
    for name in ("../fake/manifest.json", "/etc/passwd", "other"):
        with pytest.raises(KeyError):
            source.read(name, 0)
