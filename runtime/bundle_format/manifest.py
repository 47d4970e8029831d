"""Reads and writes manifest.json, and holds a bundle's files to it.

Reading fails closed. A newer format, an unknown or missing key, a wrong type, a path that leaves the bundle,
a missing file, a hash that differs: each is a BundleError of one line. The manifest's own contents are
covered by its key `checksum` (SHA-256 of the canonical JSON of all other keys), so a changed bit there shows
as well.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import BundleError
from . import external_data, signatures, strict_json
from .hashed_file import CheckedFiles
from .schema import FORMAT, Manifest

FILE_NAME = "manifest.json"
REPAIR = "write it again with `conceptmaster export`, or reinstall conceptmaster if it came with it"


def load(folder: Path) -> Manifest:
    """Reads and checks a bundle's manifest, and the hash of every file it names.

    Raises: BundleError, see the module's text.
    """
    return load_checked(folder)[0]


def load_checked(folder: Path) -> tuple[Manifest, CheckedFiles]:
    """As `load`; the files, as well, to be looked at again where they are used."""
    path = folder / FILE_NAME
    try:
        manifest = strict_json.load(Manifest, path, FORMAT)
        _check(manifest)
    except OSError as error:
        raise BundleError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise _error(f"{str(path)!r} {error}") from None
    files = CheckedFiles(folder, folder, _error)
    files.check(manifest.tokenizer)
    for graph in manifest.graphs.values():
        if graph.file:
            with files.reading(graph.files()) as path:
                _check_external(path, {(folder / file.file).resolve() for file in graph.external})
    return manifest, files


def save(manifest: Manifest, folder: Path) -> Path:
    """Writes manifest.json (whole or not at all) and returns its path. Raises OSError, ValueError for NaN and
    for graphs that do not follow one another."""
    _check(manifest)
    return strict_json.save(manifest, folder / FILE_NAME)


def _check(manifest: Manifest) -> None:
    """Raises ValueError for graphs that do not fit, and for what this version knows by name alone."""
    grid = None
    if (boxes := manifest.boxes) is not None:
        grid = manifest.grid
        if boxes.required or boxes.per_concept != grid[0]:
            raise ValueError(
                f"has boxes of another kind than one, or none, for each concept in each of {grid[0]} frames "
                "of patches, which this conceptmaster cannot honour: upgrade it"
            )
    conditioning = manifest.conditioning
    kind = "frames" if conditioning is None else "clean" if manifest.begins_clean else conditioning.kind
    collapsed = manifest.whole_text is not None
    experts = 1 if manifest.experts is None else len(manifest.experts)
    known = manifest.graphs, manifest.shapes, conditioning is not None, manifest.decoded, collapsed, kind
    side = 0 if conditioning is None else conditioning.side
    signatures.check(*known, experts, manifest.denoised, side, grid, manifest.masks_tokens)


def _check_external(graph: Path, listed: set[Path]) -> None:
    """Raises BundleError where the graph names a file for its weights that is not one of `listed`."""
    try:
        named = external_data.locations(graph)
    except ValueError as error:
        raise _error(f"{str(graph)!r} {error}") from None
    for name in sorted(named):
        for folder in (graph.parent, graph.resolve().parent):
            if "\0" in name or (folder / name).resolve() not in listed:
                raise _error(f"{str(graph)!r} has weights in {name!r}, which the manifest does not list")


def _error(what: str) -> BundleError:
    return BundleError(f"bad bundle: {what}; {REPAIR}")
