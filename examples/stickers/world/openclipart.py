"""Open Clip Art of Debian: drawings of the public domain by many hands, called as their authors called them.

A file's name has the thing, often in Italian or French, the author and a number; so of a drawing no more is
believed than the longest noun of the other sets that its first words have.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from conceptmaster.errors import InputError

NAME = "openclipart"
PACKAGE, VERSION = "openclipart-png", "1:0.18+dfsg-19"
ARCHIVE = "openclipart-png_0.18+dfsg-19_all.deb"
SHA256 = "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02"
THINGS = (
    "animals",
    "buildings/furniture",
    "buildings/homes",
    "computer/hardware",
    "education",
    "electronics",
    "food",
    "office",
    "people/clothing",
    "plants",
    "recreation/holiday",
    "recreation/music",
    "recreation/party",
    "recreation/sports",
    "recreation/toys",
    "tools",
    "transportation/boating",
    "transportation/vehicles",
)
"""Folders with drawings of things."""
COLOURLESS = re.compile(r"(^|_)(bw|b_w|contour|outline|lineart|silhouette)(_|$)")
LARGEST = 1_500_000
"""Bytes of a file; a larger one takes seconds to read, for a picture of 80 pixels."""
NO_THINGS = frozenset("simple sleeping running flying old open baby wedding menu drawn big".split())
"""Nouns of other sets that are no things in these names."""
FIRST_WORDS, LONGEST = 4, 3
"""Words of a file name that may tell the thing, and words of a noun."""


def fetch(cache: Path) -> Path:
    """Debian's package in ``cache``, fetched with apt where it is not there yet.

    Raises InputError without apt or network, and for a package with another hash.
    """
    path = cache / ARCHIVE
    without = f"go on without these drawings (--without {NAME})"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if shutil.which("apt-get") is None:
            raise InputError(
                f"the picture set {NAME} is Debian's package {PACKAGE} {VERSION}, and apt-get is not here: "
                f"copy it to {path}, or {without}"
            )
        asked = ["apt-get", "download", "-q", f"{PACKAGE}={VERSION}"]
        subprocess.run(asked, cwd=cache, capture_output=True, check=False)
        found = sorted(cache.glob(f"{PACKAGE}_*.deb"))
        if not found:
            raise InputError(
                f"the picture set {NAME} cannot be fetched (`{' '.join(asked)}` found nothing): copy "
                f"Debian's package to {path}, or {without}"
            )
        found[0].rename(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise InputError(f"{path} has SHA-256 {digest}, not {SHA256}: delete it and fetch again")
    return path


def drawings(package: Path, nouns: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """Noun and PNG file of every drawing of a thing; ``nouns``: canonical noun by every known phrase.

    Raises InputError for what is no such package.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(_member(package.read_bytes(), b"data.tar"))) as packed:
            for member in packed:
                path = PurePosixPath(member.name)
                place = str(path.parent).partition("/png/")[2] or str(path.parent)
                if not member.isfile() or path.suffix != ".png" or not _things(place):
                    continue
                noun = noun_of(path.stem, nouns)
                file = packed.extractfile(member)
                if noun is not None and file is not None and member.size <= LARGEST:
                    yield noun, file.read()
    except (OSError, tarfile.TarError, ValueError) as error:
        raise InputError(f"{package} is no Debian package of drawings: {error}") from None


def noun_of(stem: str, nouns: dict[str, str]) -> str | None:
    """The noun that a file name tells: the longest known phrase of its first words, of two as long the first;
    None where it tells none, or a drawing without colours."""
    if COLOURLESS.search(stem.lower()):
        return None
    words = [word for word in re.split(r"[^a-z]+", stem.lower()) if word][:FIRST_WORDS]
    for length in range(LONGEST, 0, -1):
        for start in range(len(words) - length + 1):
            phrase = " ".join(words[start : start + length])
            if len(phrase) > 2 and phrase in nouns and phrase not in NO_THINGS:
                return nouns[phrase]
    return None


def _things(place: str) -> bool:
    return any(f"/{place}/".find(f"/{thing}/") >= 0 for thing in THINGS)


def _member(package: bytes, start: bytes) -> bytes:
    """A member of an ar archive whose name begins so. Raises ValueError where there is none."""
    if package[:8] != b"!<arch>\n":
        raise ValueError("it is no ar archive")
    at = 8
    while at + 60 <= len(package):
        name, size = package[at : at + 16], int(package[at + 48 : at + 58])
        if name.startswith(start):
            return package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"it has no {start.decode()}")
