"""Text to token ids. The only file that imports tokenizers and ftfy."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np

from ..errors import BundleError, InputError, MissingDependency
from .bundle_format.manifest import REPAIR

PAD = 0  # the id of <pad>
PLAIN, ENTITY = re.compile(r"[ -~\t\n\r]*"), re.compile(r"&#?\w+;")


def clean(text: str) -> str:
    """`text` as diffusers' WanPipeline gives it to its tokenizer: broken encodings repaired and quotes made
    straight (ftfy), HTML entities read, twice, since some are escaped twice, any white space as one space.

    Raises: MissingDependency.
    """
    read = _read_entities(text)
    if not PLAIN.fullmatch(text + read) or ENTITY.search(read):  # else ftfy has nothing to do
        read = _read_entities(_fixed(text))
    return " ".join(read.split())


def _read_entities(text: str) -> str:
    return html.unescape(html.unescape(text))


def _fixed(text: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        raise MissingDependency(f"ftfy does not load ({error}): pip install ftfy") from error
    return ftfy.fix_text(text)


class Tokenizer:
    """The tokenizer of a bundle. Text is never cut: what does not fit is an error.

    Raises: BundleError when `path` is not a tokenizer.json; MissingDependency.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Rust
        except ImportError as error:
            raise MissingDependency(f"tokenizers does not load ({error}): pip install tokenizers") from error
        try:
            self._rust = Rust.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"bad bundle: {str(path)!r} does not load: {error}; {REPAIR}") from error
        self._rust.no_padding()
        self._rust.no_truncation()

    def encode(self, text: str, length: int, limit: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of `text`, cleaned and padded to `length`.

        Args: limit: tokens allowed, at most `length`; what: what the text is ("the caption"), for the
            message.
        Returns: ids int64 [1, length], mask bool [1, length], True on real tokens.
        Raises: InputError when the text takes more than `limit` tokens.
        """
        tokens = self._rust.encode(clean(text)).ids
        if len(tokens) > limit:
            raise InputError(f"{what} takes {len(tokens)} tokens, {limit} are allowed: make it shorter")
        ids = np.full((1, length), PAD, np.int64)
        ids[0, : len(tokens)] = tokens
        return ids, np.arange(length)[None] < len(tokens)
