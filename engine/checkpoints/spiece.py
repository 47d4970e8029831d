"""A SentencePiece model, which ComfyUI keeps in its text encoders' files, as the text of a tokenizer.json.

What of the protobuf matters is read here (sentencepiece_model.proto: the pieces, and the normalizer's map).
The tokenizer is the one that transformers makes of it for T5 and UMT5, without the extra ids that no prompt
has.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

LARGEST = 64 * 2**20  # bytes; that of UMT5 has four million
MOST_PIECES = 2**20
UNKNOWN, UNUSED = 2, 5  # kinds of a piece
VARINT, EIGHT, TEXT, FOUR = 0, 1, 2, 5  # kinds of a field on the wire
SPECIAL = ("<pad>", "</s>", "<unk>")


def from_spiece(data: bytes) -> str:
    """The text of a tokenizer.json. Raises ValueError for what is no SentencePiece model with UMT5's ids."""
    if len(data) > LARGEST:
        raise ValueError(f"it has {len(data)} bytes, more than {LARGEST}")
    pieces: list[tuple[str, float]] = []
    charsmap, unknown = b"", None
    for number, value in _fields(data):
        if number == 1:  # a piece: text, score, kind
            piece = dict(_fields(_bytes(value)))
            score = struct.unpack("<f", struct.pack("<I", int(piece.get(2, 0)) & 0xFFFFFFFF))[0]
            if piece.get(3, 1) == UNKNOWN:
                unknown = len(pieces)
            pieces.append((_bytes(piece.get(1, b"")).decode(), score))
            if len(pieces) > MOST_PIECES:
                raise ValueError(f"it has more than {MOST_PIECES} pieces")
        elif number == 3:  # the normalizer's specification
            charsmap = _bytes(dict(_fields(_bytes(value))).get(2, b""))
    return _unigram(pieces, unknown, charsmap)


def from_gguf(metadata: Mapping[str, Any]) -> str | None:
    """The text of a tokenizer.json from what llama.cpp keeps of one; None where there is none of T5's kind.
    Raises ValueError."""
    pieces, scores = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.scores")
    if metadata.get("tokenizer.ggml.model") != "t5" or pieces is None or scores is None:
        return None
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    if len(pieces) != len(scores) or len(kinds) not in (0, len(pieces)) or len(pieces) > MOST_PIECES:
        raise ValueError("its pieces, scores and kinds are not equally many")
    last = len(pieces)
    while last and len(kinds) and kinds[last - 1] == UNUSED:  # which fill the table of words
        last -= 1
    charsmap = np.asarray(metadata.get("tokenizer.ggml.precompiled_charsmap", []), np.uint8).tobytes()
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 2)
    found = [(str(piece), float(score)) for piece, score in zip(pieces[:last], scores[:last], strict=True)]
    return _unigram(found, unknown, charsmap)


def _unigram(pieces: list[tuple[str, float]], unknown: int | None, charsmap: bytes) -> str:
    if tuple(piece for piece, _ in pieces[:3]) != SPECIAL or unknown != 2:
        raise ValueError(f"its first pieces are not {', '.join(SPECIAL)}, as UMT5's are")
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    second = [{"Sequence": {"id": "B", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    values = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": piece} | plain for i, piece in enumerate(SPECIAL)],
        "normalizer": normalizer if charsmap else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single + second,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
    }
    return json.dumps(values, ensure_ascii=False)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: bytes, or a whole number."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == VARINT:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == TEXT:
            length, place = _varint(data, place)
        elif kind in (EIGHT, FOUR):
            length = 8 if kind == EIGHT else 4
        else:
            raise ValueError("it is no SentencePiece model")
        part = data[place : place + length]
        if len(part) != length:
            raise ValueError("it is cut off, or no SentencePiece model")
        place += length
        yield key >> 3, part if kind == TEXT else int.from_bytes(part, "little")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("it is cut off, or no SentencePiece model")
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("it is no SentencePiece model")


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("it is no SentencePiece model")
    return value
