"""Text to token ids. The only file that imports tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from ..errors import BundleError, InputError
from .bundle_format.manifest import REPAIR
from .cleaning import clean

PAD = 0  # the id of <pad>


class Tokenizer:
    """The tokenizer of a bundle. Text is never cut: what does not fit is an error.

    Raises: BundleError when `path` is not a tokenizer.json.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._rust = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"bad bundle: {str(path)!r} does not load: {error}; {REPAIR}") from error
        self._rust.no_padding()
        self._rust.no_truncation()

    def encode(self, text: str, limit: int, what: str) -> tuple[int, ...]:
        """Token ids of `text`, cleaned.

        Args: limit: how many are allowed; what: what the text is ("the caption"), for the message.
        Raises: InputError when it takes more.
        """
        tokens = tuple(self._rust.encode(clean(text)).ids)
        if len(tokens) > limit:
            raise InputError(f"{what} takes {len(tokens)} tokens, {limit} are allowed: make it shorter")
        return tokens


def padded(tokens: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids padded to `length`: ids int64 [1,length], mask bool [1,length], True on real tokens."""
    ids = np.full((1, length), PAD, np.int64)
    ids[0, : len(tokens)] = tokens
    return ids, np.arange(length)[None] < len(tokens)
