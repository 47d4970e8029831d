"""A folder of weights as diffusers lays it out: a subfolder for each part, with config.json and safetensors.

Only the files: where they are (on this machine, or in the Hugging Face Hub), the JSON and the tensors. What
they mean is wan.py's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ... import untrusted
from ...errors import MissingDependency, WeightsError, how_to_install
from ...hashed import identities, identity
from .base import PARTS, Base, Part
from .lazy_weights import Stored
from .safetensors_io import PICKLES, check_file, refuse_pickle, some, unreadable

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
LARGEST_INDEX = 16 * 2**20  # bytes
MOST_SHARDS = 1000
LAYOUT = "diffusers' layout"
INDEX, TOKENIZER = "model_index.json", "tokenizer/tokenizer.json"
SCHEDULER, PROCESSOR = "scheduler/scheduler_config.json", "image_processor/preprocessor_config.json"
BESIDE = (INDEX, SCHEDULER, PROCESSOR, TOKENIZER)
"""Files that are read beside the parts."""
WANTED = ["*.json", "*/*.json", "tokenizer/*", *(f"{part}/*.safetensors" for part in PARTS)]


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder in this layout, complete or not."""
    try:
        return (path / "model_index.json").is_file() or (path / "transformer").is_dir()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def files_of(folder: Path) -> list[str]:
    """The files that a base is read from, by their paths below its folder. Raises WeightsError."""
    parts = [part for part in PARTS if (folder / part).is_dir()]
    found = [name for name in BESIDE if (folder / name).is_file()]
    return found + [f"{part}/{file}" for part in parts for file in ("config.json", *_shards(folder / part))]


def open_folder(folder: Path) -> Base:
    """The base in `folder`: its JSON and the tensors' headers are read, no values. Raises WeightsError."""
    files = {name: folder / name for name in files_of(folder)}
    held = identities(files.values())
    parts = {
        name: Part(
            read_json(folder / name / "config.json"),
            stored_tensors(folder / name),
            folder / name,
            folder / name / "config.json",
        )
        for name in PARTS
        if (folder / name).is_dir()
    }
    index, scheduler, processor = (
        read_json(folder / name) if name in files else None for name in (INDEX, SCHEDULER, PROCESSOR)
    )
    tokenizer = folder / TOKENIZER
    return Base(folder, LAYOUT, parts, index or {}, scheduler, processor, tokenizer, files, held)


def locate(place: str | Path, revision: str | None = None) -> Path:
    """The folder at a local path, or the snapshot of a model of the Hugging Face Hub, fetched if need be.

    Args: place: a path, or OWNER/NAME where no folder has that path; revision: a branch, tag or commit of the
        Hub. Its cache and its environment variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, …) are honoured.
    Raises: WeightsError, one line; MissingDependency where huggingface_hub is needed and missing.
    """
    path = Path(place)
    if path.is_dir():
        if revision is not None:
            raise WeightsError(f"{path} is a folder: a revision is one of the Hugging Face Hub")
        return path
    if path.exists():
        refuse_pickle(path)
        raise WeightsError(f"{path} is a file: give the folder that has transformer/, vae/, text_encoder/")
    if not HUB_ID.fullmatch(str(place)):
        raise WeightsError(f"no folder at {place}")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"{place} is no folder, and the Hugging Face Hub needs: {how_to_install('export')}"
        ) from error
    try:
        return Path(snapshot_download(str(place), revision=revision, allow_patterns=WANTED))
    except Exception as error:  # those of huggingface_hub and of its HTTP client have no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        at = "" if revision is None else f" at revision {revision!r}"
        raise WeightsError(
            f"{place} is no folder, and not to be had from the Hub{at}: {reason:.300}"
        ) from error


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
    tensors: dict[str, Stored] = {}
    for file, names in _shards(part).items():
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
                name: Stored(path, name, torch.Size(part.get_shape()), part.get_dtype(), [], held)
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


def _shards(part: Path) -> dict[str, set[str] | None]:
    """The files of a part, each with the tensors that it should have, if an index says so."""
    indices = _listed(part, "*.safetensors.index.json")
    if len(indices) > 1:
        raise WeightsError(f"{part} has several indices: {', '.join(path.name for path in indices)}")
    if indices:
        return dict(_read_index(indices[0]))
    files = _listed(part, "*.safetensors")
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


def _listed(part: Path, pattern: str) -> list[Path]:
    """Files by a pattern, without those that macOS leaves beside them (`._name`)."""
    return sorted(path for path in part.glob(pattern) if not path.name.startswith("."))


def _plain(file: Path) -> str:
    """The name of a file without its variant."""
    return f"{file.name.partition('.')[0]}.safetensors"


def _read_index(path: Path) -> dict[str, set[str]]:
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
