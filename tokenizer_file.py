"""A tokenizer.json, looked at before the library gets it: it is a program for text, and may be anybody's.

The library trusts such a file. An empty piece makes it loop for ever, a pattern may take longer than the
universe, other things end the program (a panic of Rust's), and the ids may be any numbers. So only the
models, normalizers and so on that are listed here are read, in sizes that make sense, with patterns of one
character class and one repetition.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .untrusted import parse_json, read_plain

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")

WORD = re.compile(r"<[\w-]{1,60}>")
"""A new word, as a delta brings it (delta_file.py)."""
LARGEST_FILE = 32 * 2**20  # bytes; that of UMT5, for 256 thousand pieces, has 17 million
MOST_PIECES, MOST_ADDED, MOST_PARTS = 2**20, 4096, 64
LONGEST_PIECE, LONGEST_TEXT = 1000, 64  # characters: of a piece, of any text in a rule
LONGEST_EXPANSION = 64  # bytes that a compiled normalizer may write for a character

SECTIONS = {
    "normalizer": "BertNormalizer ByteLevel Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend Replace "
    "Strip StripAccents",
    "pre_tokenizer": "BertPreTokenizer ByteLevel Digits Metaspace Punctuation Split UnicodeScripts "
    "Whitespace WhitespaceSplit",
    "post_processor": "BertProcessing ByteLevel RobertaProcessing TemplateProcessing",
    "decoder": "BPEDecoder ByteFallback ByteLevel Fuse Metaspace Replace Strip WordPiece",
}
"""What a section may be, besides a Sequence of these, each once; Replace and Split more often."""
MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
REPEATED = ("Replace", "Sequence", "Split")

_ONE = r"(?:[^\\\[\](){}.*+?|^$]|\\[sSdDwW]|\\p\{\w{1,20}\})"
SIMPLE_PATTERN = re.compile(rf"{_ONE}(?:\+|\{{[1-9]\d?(?:,\d{{0,2}})?\}})?")
"""A pattern that cannot go back and try again: one character or class, perhaps repeated."""


def read_tokenizer(path: Path, known: int | None) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer in a file, without padding and truncation, and the file's text.

    Args: known: how many ids the text encoder has, None where nobody tells.
    Raises: ValueError, one line, for a file that is not read; OSError.
    """
    return parse_tokenizer(read_plain(path, LARGEST_FILE), known)


def parse_tokenizer(data: bytes, known: int | None) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer that the bytes of a tokenizer.json tell; else as `read_tokenizer`."""
    import tokenizers

    check(data, known)
    tokenizer = _guarded(lambda: tokenizers.Tokenizer.from_buffer(data))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    size = tokenizer.get_vocab_size()
    _require(known is None or size <= known, f"it has {size} entries, the text encoder knows {known}")
    return tokenizer, data.decode("utf-8-sig")


def add_words(tokenizer: tokenizers.Tokenizer, words: Sequence[str]) -> range:
    """Makes each of these words a token, whatever stands around it; returns their ids, behind all others.

    Raises: ValueError for a word that is a token already.
    """
    import tokenizers

    if there := next((word for word in words if tokenizer.token_to_id(word) is not None), None):
        raise ValueError(f"{there} is a token already")
    # with the space in front of it, which would else be a token of its own
    new = [tokenizers.AddedToken(word, lstrip=True, normalized=False) for word in words]
    tokenizer.add_tokens(new)
    found = [tokenizer.token_to_id(word) for word in words]
    ids = range(found[0] or 0, (found[0] or 0) + len(found)) if found else range(0)
    _require(found == list(ids), "the library gives new words no ids in a row")
    return ids


def encode(tokenizer: tokenizers.Tokenizer, text: str, known: int | None) -> tuple[int, ...]:
    """The ids of `text`. Raises ValueError where the library fails, or an id is not below `known`."""
    ids = _guarded(lambda: tuple(tokenizer.encode(text).ids))
    if known is not None and ids and max(ids) >= known:
        raise ValueError(f"it gives the id {max(ids)}, the text encoder knows {known}")
    return ids


def normalised(tokenizer: tokenizers.Tokenizer, text: str) -> str:
    """`text` as the tokenizer's normalizer changes it. Raises ValueError where the library fails."""
    normalizer = tokenizer.normalizer
    return text if normalizer is None else _guarded(lambda: normalizer.normalize_str(text))


def _guarded(call: Callable[[], T]) -> T:
    """What `call` gives. Raises ValueError for whatever the library raises: plain Exception, and for a panic
    of Rust's what is no Exception at all."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"the library fails: {' '.join(str(error).split()):.200}") from error


def check(data: bytes, known: int | None) -> None:
    """Raises ValueError, one line, for a tokenizer.json that is not read, see the module's text."""
    values = parse_json(data)
    _require(isinstance(values, dict), "it is not an object")
    model, most = values.get("model"), min(known or MOST_PIECES, MOST_PIECES)
    _require(isinstance(model, dict), "it has no model")
    kind, vocabulary = model.get("type"), model.get("vocab")
    _require(kind in MODELS, f"its model is of the type {kind!r:.60}, read are {', '.join(MODELS)}")
    if kind == "Unigram":
        _check_pieces(vocabulary, most)
        unknown = model.get("unk_id")
        _require(unknown is None or _is_id(unknown, len(vocabulary)), "its unk_id is no piece's")
    else:
        _check_ids(vocabulary, most)
    _check_options(model)
    added = values.get("added_tokens") or []
    _require(isinstance(added, list) and len(added) <= MOST_ADDED, f"more than {MOST_ADDED} added tokens")
    for token in added:
        _require(isinstance(token, dict) and _is_id(token.get("id"), most), "an added token without an id")
        content = token.get("content")
        _require(isinstance(content, str) and 0 < len(content) <= LONGEST_PIECE, "an added token's content")
    for section, kinds in SECTIONS.items():
        _check_section(section, values.get(section), kinds.split())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_id(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value < most


def _check_pieces(pieces: Any, most: int) -> None:
    """Of a Unigram: [piece, score] each, by id."""
    _require(isinstance(pieces, list), "its vocabulary is no list")
    _require(len(pieces) <= most, f"it has {len(pieces)} entries, the text encoder knows {most}")
    wrong = next((entry for entry in pieces if not _is_piece(entry)), None)
    _require(wrong is None, f"an entry of its vocabulary is no piece with a score: {wrong!r:.60}")


def _is_piece(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    piece, score = entry
    real = type(score) in (int, float) and -1e30 < score < 1e30
    return real and isinstance(piece, str) and 0 < len(piece) <= LONGEST_PIECE


def _check_ids(vocabulary: Any, most: int) -> None:
    """Of the other models: piece -> id."""
    _require(isinstance(vocabulary, dict), "its vocabulary is no object")
    _require(len(vocabulary) <= most, f"it has {len(vocabulary)} entries, the text encoder knows {most}")
    for piece, number in vocabulary.items():
        if not _is_id(number, most):
            raise ValueError(f"the id of {piece!r:.60} is {number!r:.60}, not below {most}")
        if not 0 < len(piece) <= LONGEST_PIECE:
            raise ValueError(f"the piece {piece!r:.60} is empty or too long")


def _check_options(model: dict[str, Any]) -> None:
    """What a model has besides its vocabulary."""
    _require(not model.get("dropout"), "a model with dropout gives other ids each time")
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        text = model.get(name) or ""
        _require(isinstance(text, str) and len(text) <= LONGEST_TEXT, f"its {name} is no short text")
    prefix = model.get("continuing_subword_prefix") or ""
    longest = model.get("max_input_chars_per_word", 100)
    _require(_is_id(longest, LONGEST_PIECE + 1), "its max_input_chars_per_word is beyond reason")
    merges = model.get("merges") or []
    _require(isinstance(merges, list) and len(merges) <= MOST_PIECES, "its merges are no list, or too many")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        two = isinstance(pair, list) and len(pair) == 2
        if not two or not all(isinstance(part, str) and part for part in pair):
            raise ValueError(f"a merge is no pair: {merge!r:.60}")
        if not pair[1].startswith(prefix):  # which the library cuts off, whether it is there or not
            raise ValueError(f"the merge {merge!r:.60} lacks the prefix {prefix!r}")


def _check_section(section: str, values: Any, kinds: list[str]) -> None:
    parts = list(_parts(section, values))
    types = Counter(part["type"] for part in parts if "type" in part)
    for kind, count in types.items():
        _require(kind in kinds or kind == "Sequence", f"its {section} has a {kind!r:.60}, which is not read")
        _require(count == 1 or kind in REPEATED, f"its {section} has {count} times {kind}")
    for part in parts:
        for key, value in part.items():
            if key == "precompiled_charsmap":
                _check_charsmap(value)
            elif isinstance(value, str):
                _require(len(value) <= LONGEST_TEXT, f"a text in its {section} is longer than {LONGEST_TEXT}")
        if part.get("type") == "Prepend":
            _require(part.get("prepend") != "", "it prepends nothing, which the library fails at")
        if part.get("type") == "Strip" and section == "normalizer":
            _require(not part.get("strip_left"), "it strips the start, which the library fails at")
        if part.get("type") in ("Replace", "Split"):
            _check_pattern(part)
        if part.get("type") == "TemplateProcessing":
            _check_template(part)


def _parts(section: str, values: Any) -> Iterator[dict[str, Any]]:
    """All objects in a section; few."""
    left, count = [values], 0
    while left:
        item = left.pop()
        if isinstance(item, dict):
            kind = item.get("type", "")
            _require(isinstance(kind, str), f"a part of its {section} has no type")
            yield item
        if isinstance(item, (dict, list)):
            count += 1
            _require(count <= MOST_PARTS and len(item) <= MOST_PARTS, f"its {section} has too many parts")
            left += item.values() if isinstance(item, dict) else item


def _check_template(part: dict[str, Any]) -> None:
    """What a template names must be there: the library looks it up while it works."""
    known: Any = part.get("special_tokens")
    _require(isinstance(known, dict), "its template has no special_tokens")
    for name, token in known.items():
        ids = token.get("ids") if isinstance(token, dict) and token.get("id") == name else None
        _require(isinstance(ids, list) and len(ids) > 0, f"the special token {name!r:.60} has no ids")
    sides: list[Any] = [part.get(side) for side in ("single", "pair")]
    _require(all(isinstance(side, list) for side in sides), "its template is no list")
    for piece in itertools.chain(*sides):
        token = piece.get("SpecialToken") if isinstance(piece, dict) else None
        name = token.get("id") if isinstance(token, dict) else None
        there = token is None or (isinstance(name, str) and name in known)
        _require(there, f"{name!r:.60} is no special token")


def _check_pattern(part: dict[str, Any]) -> None:
    """Of a Replace or a Split; a replacement may not make the text longer."""
    pattern, content = part.get("pattern"), part.get("content", "")
    (kind, text) = next(iter(pattern.items()), ("", "")) if isinstance(pattern, dict) else ("", "")
    _require(kind in ("String", "Regex") and isinstance(text, str) and text != "", "a pattern is missing")
    if kind == "Regex":
        _require(
            SIMPLE_PATTERN.fullmatch(text) is not None,
            f"the pattern {text!r:.60} is not read: one character or class, repeated or not, is",
        )
    longest = len(text) if kind == "String" else 1
    short = isinstance(content, str) and 0 < len(content) <= longest or part["type"] == "Split"
    _require(short, "a replacement is empty, which the library fails at, or longer than what it replaces")


def _check_charsmap(value: Any) -> None:
    """Of a Precompiled normalizer, as SentencePiece has it: the size of a double-array trie, the trie, and
    what its leaves point to, texts that each end in a zero. The library looks up whatever they say."""
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ValueError("its charsmap is no base64") from None
    size = int.from_bytes(data[:4], "little")
    _require(len(data) >= 4 and size % 1024 == 0 and 0 < size <= len(data) - 4, "its charsmap is cut off")
    units = array("I")
    _require(units.itemsize == 4, "a charsmap cannot be read on this machine")
    units.frombytes(data[4 : 4 + size])
    texts = data[4 + size :]
    _require(max(map(len, texts.split(b"\0"))) <= LONGEST_EXPANSION, "its charsmap writes too long texts")
    try:
        texts.decode()
    except UnicodeDecodeError:
        raise ValueError("its charsmap writes what is no text") from None
    for place, unit in enumerate(units):
        if unit >> 31:  # a leaf, which nothing goes on from
            continue
        target = place ^ (unit >> 10 << (unit >> 6 & 8))
        _require(target | 255 < len(units), "its charsmap points outside")
        if unit >> 8 & 1:
            text = units[target] & 0x7FFFFFFF
            starts = text <= len(texts) and (text == len(texts) or texts[text] & 0xC0 != 0x80)
            _require(starts, "its charsmap points outside of its texts")
