"""What a bundle was made from, as its manifest records it: enough to find the same weights again, and to know
them by their SHA-256. Never a path of the machine that it was made on."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .hashed_file import HashedFile, check_file
from .shapes import LONGEST_NAME
from .strict_json import added

WEIGHTS = (".safetensors", ".gguf")
"""How the names of files end that hold tensors."""


@dataclass(frozen=True)
class MergedLora:
    """A LoRA that is part of the weights: its file's name and SHA-256, and what it was multiplied with.

    partial: what the transformer has no modules for was left out (format 5); expert: the transformer that it
    is merged into, of two (format 5).
    """

    file: str
    sha256: str
    scale: float
    partial: bool = added(False)
    expert: str = added("transformer")

    def __post_init__(self) -> None:
        check_file(self.file, self.sha256)
        if "/" in self.file or not math.isfinite(self.scale):
            raise ValueError("a LoRA is recorded by the name of its file and a finite scale")
        if self.expert not in ("transformer", "transformer_2"):
            raise ValueError(f"{self.expert!r:.80} is no transformer that a LoRA is merged into")

    @property
    def option(self) -> str:
        """What gives it on the command line."""
        return "--lora" if self.expert == "transformer" else "--lora-2"

    def __str__(self) -> str:
        where = "" if self.expert == "transformer" else " for low noise"
        return f"LoRA {self.file} × {self.scale:g}{' in part' if self.partial else ''}{where}"


@dataclass(frozen=True)
class SourceRecord:
    """What a bundle was made from.

    name: OWNER/NAME in the Hugging Face Hub, the name of a folder, or preset:NAME; files: those that were
    read below it, none of a preset; commit: of the Hub; adapter: trained concept modules, by their file's
    name; loras: in the order in which they were merged; custom: deltas, merged behind them (format 6).
    """

    name: str
    files: tuple[HashedFile, ...]
    commit: str | None = None
    adapter: HashedFile | None = None
    loras: tuple[MergedLora, ...] = ()
    custom: tuple[HashedFile, ...] = added(())

    def __post_init__(self) -> None:
        from_hub = self.commit is not None
        if not re.fullmatch(r"[\w.-]{1,100}", self.commit or "none") or len(self.name) > LONGEST_NAME:
            raise ValueError("a commit is a short name, as is a source's")
        if not self.name or self.name.count("/") != from_hub or self.name in (".", ".."):
            raise ValueError(f"{self.name!r:.80} is neither a Hub id with its commit nor a folder's name")
        if len({file.file for file in self.files}) != len(self.files):
            raise ValueError("the source's files are named twice")

    def __str__(self) -> str:
        parts = [self.name if self.commit is None else f"{self.name} at {self.commit}"]
        parts += [] if self.adapter is None else [f"adapter {self.adapter.file}"]
        parts += map(str, self.loras)
        parts += [f"delta {file.file}" for file in self.custom]
        return ", ".join([*parts, f"{len(self.files)} files"])

    @property
    def needs_format_5(self) -> bool:
        """Whether it says what older formats have no key for."""
        return any(lora.partial or lora.expert != "transformer" for lora in self.loras)

    def weights(self) -> Iterator[HashedFile]:
        """The files below the source that hold tensors."""
        return (file for file in self.files if file.file.endswith(WEIGHTS))
