"""Reads and writes manifest.json, and holds a bundle's files to it.

Reading fails closed. A newer format, an unknown or missing key, a wrong type, a path that leaves the bundle,
a missing file, a hash that differs: each is a BundleError of one line. The manifest's own contents are
covered by its key `checksum` (SHA-256 of the canonical JSON of all other keys), so a changed bit there shows
as well.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import BundleError
from . import signatures, strict_json
from .hashed_file import HashedFile, sha256_file
from .schema import FORMAT, Manifest

FILE_NAME = "manifest.json"
REPAIR = "write it again with `conceptmaster export`, or reinstall conceptmaster if it came with it"


def load(folder: Path) -> Manifest:
    """Reads and checks a bundle's manifest, and the hash of every file it names.

    Raises: BundleError, see the module's text.
    """
    path = folder / FILE_NAME
    try:
        manifest = strict_json.load(Manifest, path, FORMAT)
        _check(manifest)
    except OSError as error:
        raise BundleError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise BundleError(f"bad bundle: {str(path)!r} {error}; {REPAIR}") from None
    for file in manifest.files():
        _verify(folder, file)
    return manifest


def save(manifest: Manifest, folder: Path) -> Path:
    """Writes manifest.json (whole or not at all) and returns its path. Raises OSError, ValueError for NaN and
    for graphs that do not follow one another."""
    _check(manifest)
    return strict_json.save(manifest, folder / FILE_NAME)


def _check(manifest: Manifest) -> None:
    """Raises ValueError for graphs that do not fit, and for what this version knows by name alone."""
    unknown = [name for name in ("boxes", "experts") if getattr(manifest, name) is not None]
    if unknown:
        raise ValueError(f"has {', '.join(unknown)}, which this conceptmaster cannot honour: upgrade it")
    conditioned = manifest.conditioning is not None
    signatures.check(manifest.graphs, manifest.shapes, conditioned, manifest.decoded)


def _verify(folder: Path, file: HashedFile) -> None:
    path = folder / file.file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"bad bundle: {str(path)!r} is a link out of the bundle; {REPAIR}")
    if not path.is_file():
        raise BundleError(f"bad bundle: {str(path)!r} is missing; {REPAIR}")
    try:
        found = sha256_file(path)
    except OSError as error:
        raise BundleError(f"cannot read {str(path)!r}: {error.strerror}") from None
    if found != file.sha256:
        raise BundleError(f"bad bundle: {str(path)!r} has SHA-256 {found}, expected {file.sha256}; {REPAIR}")
