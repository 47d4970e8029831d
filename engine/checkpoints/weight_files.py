"""Files of tensors: one, or shards that an index names. Headers are read, values when they are used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ... import untrusted
from ...errors import WeightsError
from ...hashed import identity
from .lazy_weights import Stored
from .safetensors_io import PICKLES, check_file, refuse_pickle, some, unreadable

LARGEST_INDEX = 16 * 2**20  # bytes
MOST_SHARDS = 1000


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises WeightsError."""
    if not path.exists():
        raise WeightsError(f"{path} is missing")
    try:
        values = untrusted.read_json(path, LARGEST_INDEX)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is not JSON that is read: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} is not a JSON object")
    return values


def stored_tensors(part: Path) -> dict[str, Stored]:
    """All tensors of one part, where they lie: headers are read, no values.

    One safetensors file, or the shards that the index beside them names. Raises WeightsError for a part
    without safetensors, an index that is wrong, or a damaged file.
    """
    return _merged(part, shards(part))


def tensors_of(index: Path) -> dict[str, Stored]:
    """All tensors of the shards that an index names. Raises WeightsError."""
    return _merged(index.parent, dict(read_index(index)))


def _merged(part: Path, files: Mapping[str, set[str] | None]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file, names in files.items():
        path = part / file
        found = read_header(path)
        if names is not None and set(found) != names:
            wrong = some(sorted(set(found) ^ names))
            raise WeightsError(f"{path} and the index beside it do not agree on: {wrong}")
        tensors |= found
    return tensors


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file, where they lie. Raises WeightsError, FileNotFoundError."""
    check_file(path)
    try:
        held = identity(path)
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Stored.in_file(path, name, torch.Size(part.get_shape()), part.get_dtype(), held)
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


def shards(part: Path) -> dict[str, set[str] | None]:
    """The files of a part, each with the tensors that it should have, if an index says so."""
    found = indices(part)
    if len(found) > 1:
        raise WeightsError(f"{part} has several indices: {', '.join(path.name for path in found)}")
    if found:
        return dict(read_index(found[0]))
    files = listed(part, "*.safetensors")
    # NAME.fp16.safetensors beside NAME.safetensors has fewer bits: diffusers takes the plain one, too
    there = {file.name for file in files}
    files = [file for file in files if file.name == _plain(file) or _plain(file) not in there]
    if not files:
        for path in sorted(part.glob("*")):
            if path.suffix in PICKLES:
                refuse_pickle(path)
        raise WeightsError(f"{part} has no safetensors")
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise WeightsError(f"{part} has several safetensors and no index that says which to read: {names}")
    return {files[0].name: None}


def indices(part: Path) -> list[Path]:
    """The indices of shards in a folder; those of a variant (NAME.safetensors.index.fp16.json) only where
    nothing is there without one."""
    plain = listed(part, "*.safetensors.index.json")
    if plain or any(file.name == _plain(file) for file in listed(part, "*.safetensors")):
        return plain
    return listed(part, "*.safetensors.index.*.json")


def listed(part: Path, pattern: str) -> list[Path]:
    """Files by a pattern, without those that macOS leaves beside them (`._name`)."""
    return sorted(path for path in part.glob(pattern) if not path.name.startswith("."))


def _plain(file: Path) -> str:
    """The name of a file without its variant."""
    return f"{file.name.partition('.')[0]}.safetensors"


def read_index(path: Path) -> dict[str, set[str]]:
    """The shards that an index names, each with the names of its tensors."""
    entries = read_json(path).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
        raise WeightsError(f"{path} has no weight_map from tensors to files")
    shards: dict[str, set[str]] = {}
    for name, file in entries.items():
        shards.setdefault(file, set()).add(name)
    if len(shards) > MOST_SHARDS:
        raise WeightsError(f"{path} names {len(shards)} files, more than {MOST_SHARDS}")
    # Names only: what is in another folder is not this part's, and a path could lead anywhere.
    outside = sorted(file for file in shards if not re.fullmatch(r"\w[\w.-]*", file))
    if outside:
        raise WeightsError(f"{path} names files that are not in its folder: {some(outside)}")
    for file in shards:
        refuse_pickle(path.parent / file)
    missing = sorted(file for file in shards if not (path.parent / file).is_file())
    if missing:
        raise WeightsError(f"{path} names files that are missing: {some(missing)}")
    return shards
