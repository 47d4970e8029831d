import io
import tarfile

import pytest
from PIL import Image

from conceptmaster.errors import InputError
from conceptmaster.examples.stickers.world import openclipart

NOUNS = {"bear": "bear", "teddy bear": "teddy bear", "teddy": "teddy bear", "wasp": "wasp", "hen": "chicken"}


@pytest.mark.parametrize(
    ("stem", "noun"),
    [
        ("simple_teddy_bear_with__01", "teddy bear"),
        ("flying_wasp_gerald_g._01", "wasp"),
        ("hen_01", "chicken"),
        ("tigre03_architetto_franc_01", None),
        ("hen_bw", None),
        ("contour_bear", None),
        ("john_paul_smith_of_the_bear", None),
    ],
)
def test_a_file_name_tells_the_longest_known_noun_of_its_first_words(stem, noun):
    assert openclipart.noun_of(stem, NOUNS) == noun


def package(path, files):
    """A Debian package as dpkg writes it: an ar archive of three members."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as packed:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in members.items():
            file.write(f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


def test_drawings_of_things_are_read_out_of_the_package(tmp_path):
    png = io.BytesIO()
    Image.new("RGBA", (4, 4), "red").save(png, "PNG")
    root = "./usr/share/openclipart/png"
    files = {
        f"{root}/animals/birds/hen_01.png": png.getvalue(),
        f"{root}/shapes/stars/hen_02.png": png.getvalue(),
        f"{root}/animals/readme.txt": b"hen",
    }
    found = list(openclipart.drawings(package(tmp_path / "a.deb", files), NOUNS))
    assert found == [("chicken", png.getvalue())]


@pytest.mark.parametrize("content", [b"", b"!<arch>\n", b"!<arch>\n" + b"x" * 60, b"PK\x03\x04"])
def test_what_is_no_package_is_named(tmp_path, content):
    path = tmp_path / "b.deb"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"b\.deb is no Debian package"):
        list(openclipart.drawings(path, NOUNS))


def test_without_apt_one_line_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(openclipart.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"copy it to .*openclipart.*\.deb, or .*--without openclipart"):
        openclipart.fetch(tmp_path)


def test_the_cache_is_made(tmp_path, monkeypatch):
    """What the README's command says first, on a machine that has fetched nothing yet."""
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text("#!/bin/sh\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(apt.parent), prepend=":")
    with pytest.raises(InputError, match="cannot be fetched"):
        openclipart.fetch(tmp_path / "not" / "there")
    assert (tmp_path / "not" / "there").is_dir()


def test_another_package_is_refused(tmp_path):
    (tmp_path / openclipart.ARCHIVE).write_bytes(b"another")
    with pytest.raises(InputError, match="SHA-256"):
        openclipart.fetch(tmp_path)
