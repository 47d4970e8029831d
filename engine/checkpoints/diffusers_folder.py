"""A folder of weights as diffusers lays it out: a subfolder for each part, with config.json and safetensors.

Only the files: where they are (on this machine, or in the Hugging Face Hub), the JSON and the tensors. What
they mean is wan.py's.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ...errors import WeightsError
from ...hashed import identities
from .base import PARTS, Base, Part
from .bernini import ROOT, check_root, index_of, is_bernini, skips
from .derived import derive
from .hub import HUB_ID, snapshot
from .spellings import as_diffusers
from .weight_files import read_json, shards, stored_tensors

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


def files_of(folder: Path, without: Collection[str] = ()) -> list[str]:
    """The files that a base is read from, by their paths below its folder; without these parts. Raises
    WeightsError."""
    parts = [part for part in PARTS if part not in without and (folder / part).is_dir()]
    found = [name for name in BESIDE if (folder / name).is_file()]
    return found + [f"{part}/{file}" for part in parts for file in ("config.json", *shards(folder / part))]


def open_folder(folder: Path, without: Collection[str] = ()) -> Base:
    """The base in `folder`: its JSON and the tensors' headers are read, no values.

    Args: without: parts whose tensors lie elsewhere; their config.json is read where there is one.
    Raises: WeightsError.
    """
    path = folder / ROOT
    root = read_json(path) if path.is_file() else {}
    check_root(path, root)
    names = files_of(folder, (*without, *(["transformer_2"] if skips(root) else [])))
    files = {name: folder / name for name in [*names, *([ROOT] if is_bernini(root) else [])]}
    held = identities(files.values())
    parts = {}
    for name in PARTS:
        part, told = folder / name, folder / name / "config.json"
        if name in without and told.is_file():
            parts[name] = Part(read_json(told), {}, part, told)
        elif name not in without and part.is_dir() and f"{name}/config.json" in files:
            tensors = as_diffusers(name, stored_tensors(part), part)
            parts[name] = Part(derive(name, tensors, part, read_json(told)), tensors, part, told)
    index, scheduler, processor = (
        read_json(folder / name) if name in files else None for name in (INDEX, SCHEDULER, PROCESSOR)
    )
    tokenizer, index = folder / TOKENIZER, index or {}
    if is_bernini(root):
        index = index_of(path, root, index)
    return Base(folder, LAYOUT, parts, index, root, scheduler, processor, tokenizer, files, held)


def locate(place: str | Path, revision: str | None = None) -> Path:
    """The folder or file at a path, or the snapshot of a model of the Hugging Face Hub, fetched if need be.

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
        return path
    if not HUB_ID.fullmatch(str(place)):
        raise WeightsError(f"no folder at {place}")
    found = snapshot(str(place), revision, WANTED)
    if not is_folder(found):
        raise WeightsError(
            f"{place} of the Hub is not in diffusers' layout: take the release that ends in -Diffusers, or "
            "fetch its files and give their folder"
        )
    return found
