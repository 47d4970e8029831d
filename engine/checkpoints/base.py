"""What a base of any layout is opened as, before its meaning is looked at: parts, under diffusers' names.

A layout's own file (diffusers_folder.py, …) finds the files and gives their tensors diffusers' and
transformers' names; wan.py reads configuration and weights out of what it made, and opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import WeightsError
from ...hashed import Identity
from .lazy_weights import Stored

PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")
"""The parts that have tensors: the second transformer is Wan2.2's low-noise expert, the last is CLIP."""


@dataclass(frozen=True)
class Part:
    """One module's configuration and weights.

    config: what its config.json in diffusers' or transformers' layout says, read or derived from the tensors;
    tensors: under the names of these libraries; where: the folder or the file of the weights; told: the file
    that says the configuration. The last two are for messages.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    where: Path
    told: Path


@dataclass(frozen=True)
class Base:
    """Everything that a place holds.

    where: the folder, or one of the files; layout: in words; parts: out of PARTS; index: what
    model_index.json says, or the layout implies ("_class_name", "boundary_ratio", "expand_timesteps");
    root: what a config.json beside the parts says of the whole (bernini.py);
    scheduler, processor: what scheduler_config.json and preprocessor_config.json say, None without;
    tokenizer: the tokenizer.json, which may be missing, a SentencePiece model's file, or a tokenizer.json's
    text, where it lay in the weights; files: all that was read, by the name under which it
    is recorded; held: what these were before they were read.
    """

    where: Path
    layout: str
    parts: Mapping[str, Part]
    index: Mapping[str, Any] = field(default_factory=dict)
    root: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] | None = None
    processor: Mapping[str, Any] | None = None
    tokenizer: str | Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    held: Mapping[Path, Identity] = field(default_factory=dict)

    def part(self, name: str) -> Part:
        """One of PARTS. Raises WeightsError where it is not there."""
        if name not in self.parts:
            raise WeightsError(f"{self.where} has no {name}")
        return self.parts[name]
