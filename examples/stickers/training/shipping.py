"""What ``conceptmaster export`` reads, out of a training's folder."""

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
FILES = ["model.safetensors", "vae.safetensors", "tokenizer.json", *(f"{name}.json" for name in TOLD)]


def collect(training: Path, output: Path) -> None:
    """Write a training's averaged weights, rounded to float16, and all that goes with them, whole or not at
    all. Takes the place of an older one; raises InputError where there is nothing to write, or where the
    folder ``output`` holds anything else."""
    for name in FILES[:3]:
        if not (training / name).exists():
            raise InputError(f"{training / name} is missing: give a folder that `train` has filled")
    with replacing_folder(output, lambda _: FILES, replace=True) as new:
        save_rounded(training / "model.safetensors", new / "model.safetensors")
        tensors, metadata = load(training / "vae.safetensors")
        save(new / "vae.safetensors", {name: value.half() for name, value in tensors.items()}, metadata)
        shutil.copyfile(training / "tokenizer.json", new / "tokenizer.json")
        for name, content in TOLD.items():
            (new / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
