"""Text to token ids."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BundleError, InputError, wrong_in
from ..tokenizer_file import WORD, add_words, encode, normalised, read_tokenizer
from .bundle_format.manifest import REPAIR
from .cleaning import clean
from .naming import spoken

if TYPE_CHECKING:
    from .bundle_format.find import Bundle
    from .bundle_format.schema import Manifest
    from .guidance import Guidance
    from .request import Request

PAD = 0  # the id of <pad>
LONGEST_TOKEN = 64  # characters; on the average of a text


class Tokenizer:
    """The tokenizer of a bundle. Text is never cut: what does not fit is an error.

    Args: path: a tokenizer.json; known: how many ids the bundle's text encoder has, None where nobody tells;
    words: new ones, which get the ids behind all others, `ids`.
    Raises: BundleError when it is none, or one that is not read (see tokenizer_file.py); InputError for a
    word that is a token already.
    """

    def __init__(self, path: Path, known: int | None = None, words: Sequence[str] = ()) -> None:
        self._path, self._known = path, known
        try:
            self._rust, _ = read_tokenizer(path, known)
        except OSError as error:
            raise BundleError(f"cannot read {str(path)!r}: {error.strerror}") from None
        except ValueError as error:
            raise self._bad(error) from error
        try:
            self.ids = dict(zip(words, add_words(self._rust, words), strict=True))
        except ValueError as error:
            raise InputError(f"a delta's word: {error} of this bundle") from None
        self._known = None if known is None else max([known, *(number + 1 for number in self.ids.values())])

    def _bad(self, error: ValueError) -> BundleError:
        return BundleError(f"bad bundle: {str(self._path)!r} is no tokenizer that is read: {error}; {REPAIR}")

    def read(self, text: str) -> str:
        """`text` as far as the model can tell it from others: cleaned, and changed (to lower case, say) as
        the tokenizer changes it before it looks for tokens."""
        try:
            return " ".join(normalised(self._rust, clean(text)).replace("▁", " ").split())
        except ValueError as error:
            raise self._bad(error) from error

    def encode(self, text: str, limit: int, what: str, why: str = "") -> tuple[int, ...]:
        """Token ids of `text`, cleaned.

        Args: limit: how many are allowed; what: what the text is ("the caption"), why: what else there is to
            say of the limit, both for the message.
        Raises: InputError when it takes more; BundleError when the tokenizer fails.
        """
        text = clean(text)
        if len(text) > LONGEST_TOKEN * limit:  # nobody has to count
            raise InputError(
                f"{what} has {len(text)} characters for {limit} tokens at most: make it shorter{why}"
            )
        try:
            tokens = encode(self._rust, text, self._known)
        except ValueError as error:
            raise self._bad(error) from error
        if len(tokens) > limit:
            raise InputError(f"{what} takes {len(tokens)} tokens, {limit} are allowed: make it shorter{why}")
        return tokens

    def check_words(self, what: str, text: str, every: bool) -> None:
        """Raises InputError for a word <x> of a text that no token stands for; every: and for a new word that
        the text does not say."""
        said = WORD.findall(clean(text))
        for word in said:
            if self._rust.token_to_id(word) is None:
                raise InputError(
                    f"{what} says {word}, a word that no token stands for: hand in the delta that brings it, "
                    "with --custom FILE"
                )
        if every and (unsaid := [word for word in self.ids if word not in said]):
            raise InputError(f"{what} does not say {unsaid[0]}, the word of a delta that is handed in")


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """A bundle's tokenizer, with the words that are handed in. Raises as the class."""
    words = () if bundle.custom is None else tuple(bundle.custom.words)
    with bundle.files.reading([bundle.manifest.tokenizer]) as path:
        return Tokenizer(path, bundle.manifest.token_ids, words)


def tokenised(
    request: Request, guidance: Guidance, manifest: Manifest, tokenizer: Tokenizer
) -> dict[str, tuple[int, ...]]:
    """Every text of a request (its prompt, as it is and as it is `spoken`, what the unguided branch reads,
    the labels where the model reads them), each with its tokens.

    Raises: InputError for a text that is too long, for a prompt or a label of which the bundle reads nothing,
        for two labels that it reads alike, and for words of deltas as `Tokenizer.check_words`.
    """
    shapes, bundle = manifest.shapes, f"the bundle {manifest.name!r}"
    whole = spoken(request, manifest)
    texts = [("prompt", "no text", ""), ("prompt", "the prompt", request.prompt)]
    if whole != request.prompt:
        texts.insert(1, ("prompt", "the prompt, with its prefix and the pictures' names,", whole))
    if request.negative and not all(guidance.caption):
        texts.append(("negative", "the negative prompt", request.negative))
    labels = [c.label for c in request.concepts] if manifest.reads_labels else []
    texts += [("concepts", f"the label {label!r}", label) for label in labels]
    with wrong_in("prompt"):
        tokenizer.check_words("the prompt", request.prompt, every=True)
    tokens: dict[str, tuple[int, ...]] = {}
    for field, what, text in texts:
        limit, why = manifest.prompt_tokens, manifest.cut
        if field == "concepts":
            limit, why = shapes.label_tokens, ""
        with wrong_in(field):
            tokenizer.check_words(what, text, every=False)
            tokens[text] = tokenizer.encode(text, limit, what, why)
            if text in (request.prompt, *labels) and tokens[text] == tokens[""]:
                raise InputError(f"{what} is empty: {bundle} reads no word of it")
    with wrong_in("concepts"):
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


def padding_bias(counts: Sequence[int], length: int, whole: int) -> np.ndarray:
    """What makes `length` keys of a text those of `whole` tokens: a bias of their logits, float32 [K,length].

    counts: real tokens of each branch's text. 0 for these, log(whole - count) for the next key, which stands
    for all padding, minus infinity behind it. Padded tokens are all the same, and so are their keys and
    values: their weights add up to that of the one.
    """
    bias = np.full((len(counts), length), -np.inf, np.float32)
    for row, count in zip(bias, counts, strict=True):
        row[:count] = 0.0
        if count < length:
            row[count] = math.log(whole - count)
    return bias
