"""Text to token ids. The only file that imports tokenizers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from ..errors import BundleError, InputError
from .bundle_format.manifest import REPAIR
from .cleaning import clean

if TYPE_CHECKING:
    from .bundle_format.schema import Manifest
    from .guidance import Guidance
    from .request import Request

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

    def read(self, text: str) -> str:
        """`text` as far as the model can tell it from others: cleaned, and changed (to lower case, say) as
        the tokenizer changes it before it looks for tokens."""
        text, normalizer = clean(text), self._rust.normalizer
        if normalizer is None:
            return text
        return " ".join(normalizer.normalize_str(text).replace("▁", " ").split())

    def encode(self, text: str, limit: int, what: str) -> tuple[int, ...]:
        """Token ids of `text`, cleaned.

        Args: limit: how many are allowed; what: what the text is ("the caption"), for the message.
        Raises: InputError when it takes more.
        """
        tokens = tuple(self._rust.encode(clean(text)).ids)
        if len(tokens) > limit:
            raise InputError(f"{what} takes {len(tokens)} tokens, {limit} are allowed: make it shorter")
        return tokens


def tokenised(
    request: Request, guidance: Guidance, manifest: Manifest, tokenizer: Tokenizer
) -> dict[str, tuple[int, ...]]:
    """Every text of a request (its prompt, what the unguided branch reads, its labels), each with its tokens.

    Raises: InputError for a text that is too long, for a prompt or a label of which the bundle reads nothing,
        and for two labels that it reads alike.
    """
    shapes, bundle = manifest.shapes, f"the bundle {manifest.name!r}"
    texts = [("no text", "", shapes.text_tokens), ("the prompt", request.prompt, shapes.text_tokens)]
    if request.negative and not all(guidance.caption):
        texts.append(("the negative prompt", request.negative, shapes.text_tokens))
    texts += [(f"the label {c.label!r}", c.label, shapes.label_tokens) for c in request.concepts]
    tokens = {text: tokenizer.encode(text, limit, what) for what, text, limit in texts}
    labels = [c.label for c in request.concepts] if manifest.reads_labels else []
    for what, text, _ in texts:
        if text in (request.prompt, *labels) and tokens[text] == tokens[""]:
            raise InputError(f"{what} is empty: {bundle} reads no word of it")
    for one, two in itertools.combinations(labels, 2):
        if tokens[one] == tokens[two]:
            alike = f"{bundle} reads the labels {one!r} and {two!r} alike"
            raise InputError(f"{alike}: labels must differ, they are what binds")
    return tokens


def padded(tokens: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids padded to `length`: ids int64 [1,length], mask bool [1,length], True on real tokens."""
    ids = np.full((1, length), PAD, np.int64)
    ids[0, : len(tokens)] = tokens
    return ids, np.arange(length)[None] < len(tokens)
