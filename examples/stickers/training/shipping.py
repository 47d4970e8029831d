"""What ``conceptmaster export`` reads, and another training can begin from, out of a training's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conceptmaster.engine.checkpoints.safetensors_io import load, save
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.training.train import save_rounded
from conceptmaster.runtime.atomic_folder import replacing_folder

from ..world.words import COLOURS, GROUNDS, PLACES, PLAIN, VERBS
from .packing import HEADS

PLAINEST = {
    "places": [wordings[0] for wordings in PLACES.values()],
    "motions": [wordings[0] for wordings in VERBS.values()],
    "backgrounds": [*(wordings[0] for wordings in GROUNDS.values()), *(PLAIN[0].format(c) for c in COLOURS)],
}
TOLD: dict[str, dict[str, Any]] = {
    "defaults": {
        "solver": "unipc",
        "steps": 4,
        "shift": 3.0,
        "guidance": 1.5,
        "concept_guidance": None,
        "negative": "",
    },
    "vocabulary": {"open": True, "phrases": PLAINEST},
    "ranges": {"steps": [2, 50], "guidance": [1, 3], "concepts": [0, 4]},
}
"""Sampling defaults, words and numbers that the model is made for, by the names of their files."""
NEEDED = ["model.safetensors", "vae.safetensors", "tokenizer.json", "vae.json", HEADS]
FILES = [*NEEDED, *(f"{name}.json" for name in TOLD)]


def collect(training: Path, output: Path, *, overwrite: bool = False) -> None:
    """Write a training's averaged weights, rounded to float16, and all that goes with them, whole or not at
    all. Raises InputError where there is nothing to write, and where the folder ``output`` holds files, but
    for weights that ``overwrite`` replaces."""
    for name in NEEDED:
        if not (training / name).exists():
            raise InputError(f"{training / name} is missing: give a folder that `train` has filled")
    with replacing_folder(output, lambda _: FILES, replace=overwrite) as new:
        save_rounded(training / "model.safetensors", new / "model.safetensors")
        for name in ("vae.safetensors", HEADS):
            tensors, metadata = load(training / name)
            save(new / name, {name: value.half() for name, value in tensors.items()}, metadata)
        for name in ("tokenizer.json", "vae.json"):
            shutil.copyfile(training / name, new / name)
        for name, content in TOLD.items():
            (new / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
