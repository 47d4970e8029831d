"""Deltas that are handed in beside a bundle: new words for its text encoder, and changes of the weights that
make the text's keys and values (delta_file.py). `denoise` and its engines stay as they are.

ONNX Runtime gets the graphs changed (backends/changed_graph.py), the torch backend its weights. TensorRT's
engines cannot be changed: there a delta is merged at export.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..delta_file import Delta, check_fits, read_delta, words_of
from ..errors import InputError
from ..hashed import sha256_file
from ..untrusted import open_plain
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .bundle_format.find import Bundle


@dataclass(frozen=True)
class Custom:
    """Deltas, in their order: their words, float32 [Dt] each, and the first word's id, which others follow.
    merged: files that are part of the bundle already, whose weights the torch backend merges anew."""

    deltas: tuple[Delta, ...]
    words: Mapping[str, np.ndarray]
    first: int
    merged: tuple[Path, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that were given."""
        return (*(delta.path for delta in self.deltas), *self.merged)


def hashes(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The SHA-256 of these files. Raises InputError, one line, for what cannot be read."""
    found = []
    for path in map(Path, paths):
        try:
            open_plain(path).close()
            found.append(sha256_file(path))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"cannot read the delta {str(path)!r}: {reason}") from None
    return found


def hand_in(bundle: Bundle, paths: Sequence[str | os.PathLike[str]]) -> Custom:
    """The deltas of these files, for a bundle. Raises InputError, one line, for a file that is none, or one
    for another model; whether its base is the bundle's is seen when weights are read."""
    manifest = bundle.manifest
    recorded = set() if manifest.source is None else {file.sha256 for file in manifest.source.custom}
    files = [Path(os.path.abspath(path)) for path in paths]
    merged = tuple(path for path in files if recorded and path.is_file() and sha256_file(path) in recorded)
    deltas = tuple(read_delta(path) for path in files if path not in merged)
    experts = manifest.experts or ()
    check_fits(
        deltas,
        manifest.model["concept"]["injection"],
        manifest.shapes.text_width,
        [expert.name for expert in experts] or ["transformer"],
    )
    words = words_of(deltas)
    ids = Tokenizer(bundle.tokenizer, manifest.token_ids, tuple(words)).ids
    return Custom(deltas, words, min(ids.values(), default=0), merged)
