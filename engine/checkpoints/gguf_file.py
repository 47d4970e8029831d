"""GGUF files: their header, read with bounds, and their tensors, dequantised when they are used.

The format is llama.cpp's (its docs: gguf.md): counts, metadata, one entry for each tensor, then the tensors,
each at a multiple of the alignment. Types, block sizes and what a block stands for are the `gguf` package's,
which is imported here only; its reader is not used, as it believes whatever counts a file tells. ComfyUI-GGUF
writes tensors of more axes than GGUF knows with fewer, and the true ones as `comfy.gguf.orig_shape.NAME`.

Rows of blocks become float16, rounded to the nearest; F32, F16 and BF16 are read as they are.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...errors import MissingDependency, WeightsError, how_to_install
from ...hashed import Identity, identity
from ...untrusted import open_plain
from .fp8 import in_16_bits
from .lazy_weights import Stored

MAGIC, VERSIONS = b"GGUF", (2, 3)
LARGEST_HEADER = 64 * 2**20  # bytes; a vocabulary of 256 thousand pieces has ten
MOST_ENTRIES, MOST_AXES, MOST_ELEMENTS = 2**16, 8, 2**48
LONGEST_NAME, LONGEST_STRING = 1000, 2**20  # bytes
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
CHUNK = 2**24  # elements that are dequantised at a time
STRING, ARRAY = 8, 9
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Of struct, by the number that the format has for a kind of metadata."""
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
WHOLE = {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file: its type's name, the first byte, rows and bytes of a row."""

    path: Path
    held: Identity
    kind: str
    start: int
    rows: int
    row_bytes: int


def read_gguf(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors of a GGUF file, where they lie, and its metadata.

    Raises: FileNotFoundError; WeightsError, one line, for a file that is cut off or damaged, tells counts or
        places beyond reason, or has a tensor of a type that `gguf` does not know; MissingDependency.
    """
    if not path.exists():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        held = identity(path)
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            header = BytesIO(file.read(min(size, LARGEST_HEADER)))
        return _Header(header, size).tensors(path, held)
    except (OSError, ValueError, struct.error, OverflowError) as error:
        if isinstance(error, MissingDependency):
            raise
        reason = "its header is cut off" if isinstance(error, struct.error) else " ".join(str(error).split())
        raise WeightsError(f"{path} is not a readable GGUF file: {reason:.300}") from error


class _Header:
    """The header of a file of `size` bytes."""

    def __init__(self, data: BinaryIO, size: int) -> None:
        self._data, self._size = data, size

    def tensors(self, path: Path, held: Identity) -> tuple[dict[str, Stored], dict[str, Any]]:
        if self._bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("I")) not in VERSIONS:
            raise ValueError(f"it is of version {version}, read are {VERSIONS[0]} and {VERSIONS[1]}")
        count, entries = self._number("Q"), self._number("Q")
        if max(count, entries) > MOST_ENTRIES:
            raise ValueError(f"it tells of {count} tensors and {entries} entries, more than {MOST_ENTRIES}")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string(LONGEST_NAME)
            if key in metadata:
                raise ValueError(f"it has the entry {key!r:.100} twice")
            metadata[key] = self._value(self._number("I"))
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._string(LONGEST_NAME)
            if name in infos:
                raise ValueError(f"it has the tensor {name!r:.100} twice")
            if (axes := self._number("I")) > MOST_AXES:
                raise ValueError(f"the tensor {name!r:.100} has {axes} axes, more than {MOST_AXES}")
            shape = tuple(reversed([self._number("Q") for _ in range(axes)]))
            infos[name] = shape, self._number("I"), self._number("Q")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment!r:.40}, no power of two")
        begin = -(-self._data.tell() // alignment) * alignment
        places = {name: self._place(name, *info, begin, path, held) for name, info in infos.items()}
        _check_overlap(places)
        return {
            name: _stored(place, name, infos[name][0], metadata) for name, place in places.items()
        }, metadata

    def _place(
        self,
        name: str,
        shape: tuple[int, ...],
        number: int,
        offset: int,
        begin: int,
        path: Path,
        held: Identity,
    ) -> _Place:
        kind, block, block_bytes = _type(name, number)
        columns = shape[-1] if shape else 1
        elements = 1
        for length in shape:
            elements *= length
        if not 0 < elements <= MOST_ELEMENTS or columns % block:
            raise ValueError(f"the tensor {name!r:.100} of the type {kind} cannot have the shape {shape}")
        row_bytes = columns // block * block_bytes
        rows, start = elements // columns, begin + offset
        if start + rows * row_bytes > self._size:
            raise ValueError(
                f"the tensor {name!r:.100} lies outside of the file, which is cut off or damaged"
            )
        return _Place(path, held, kind, start, rows, row_bytes)

    def _bytes(self, count: int) -> bytes:
        data = self._data.read(count)
        if len(data) != count:
            raise ValueError("its header is cut off, or beyond reason")
        return data

    def _number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self._bytes(struct.calcsize(f"<{kind}")))[0]

    def _string(self, longest: int = LONGEST_STRING) -> str:
        if (length := self._number("Q")) > longest:
            raise ValueError(f"it has a text of {length} bytes, more than {longest}")
        return self._bytes(length).decode("utf-8", "replace")

    def _value(self, kind: int, inside: bool = False) -> Any:
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY or inside:
            raise ValueError(f"it has metadata of the kind {kind} where there is none")
        of, length = self._number("I"), self._number("Q")
        if of in NUMBERS:
            width = struct.calcsize(f"<{NUMBERS[of]}")
            if length * width > LARGEST_HEADER:
                raise ValueError(f"it has a list of {length} numbers")
            return np.frombuffer(self._bytes(length * width), np.dtype(NUMBERS[of]).newbyteorder("<"))
        if length > LARGEST_HEADER // 8:
            raise ValueError(f"it has a list of {length} texts")
        return [self._value(of, inside=True) for _ in range(length)]


def _type(name: str, number: int) -> tuple[str, int, int]:
    """A type's name, and the elements and bytes of a block of it."""
    kind, block, size = _known(number)
    if not block:
        raise ValueError(
            f"the tensor {name!r:.100} is of the type {kind}, which the gguf package does not know"
        )
    return kind, block, size


@cache
def _known(number: int) -> tuple[str, int, int]:
    """The same; no elements for a type that the package does not dequantise."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise MissingDependency(f"GGUF files need gguf: {how_to_install('export')}") from error
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in WHOLE | PLAIN:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        named = gguf.GGMLQuantizationType._value2member_map_.get(number)
        return getattr(named, "name", f"number {number}"), 0, 0
    return kind.name, block, size


def _check_overlap(places: Mapping[str, _Place]) -> None:
    end, before = 0, ""
    for name, place in sorted(places.items(), key=lambda entry: entry[1].start):
        if place.start < end:
            raise ValueError(f"the tensors {before!r:.100} and {name!r:.100} lie on each other")
        end, before = place.start + place.rows * place.row_bytes, name


def _stored(place: _Place, name: str, shape: tuple[int, ...], metadata: Mapping[str, Any]) -> Stored:
    original = metadata.get(f"{ORIGINAL_SHAPE}{name}")
    if original is not None:
        if not isinstance(original, np.ndarray) or original.dtype.kind not in "iu":
            raise ValueError(f"{ORIGINAL_SHAPE}{name:.100} is no list of whole numbers")
        found = torch.Size(int(length) for length in original if 0 < int(length) <= MOST_ELEMENTS)
        if len(found) != len(original) or found.numel() != torch.Size(shape).numel():
            raise ValueError(f"the tensor {name!r:.100} is {shape}, and told to have been {tuple(found)}")
        shape = tuple(found)
    kind = place.kind if place.kind in PLAIN | WHOLE else "F16"
    return Stored(partial(_read, place, shape), torch.Size(shape), kind)


def _read(place: _Place, shape: tuple[int, ...]) -> Tensor:
    """A tensor's values, rows at a time. Raises WeightsError."""
    try:
        with open_plain(place.path) as file:
            if place.held != identity(place.path):
                raise WeightsError(f"{place.path} was changed while it was in use: start again")
            file.seek(place.start)
            dtype = (PLAIN | WHOLE).get(place.kind)
            if dtype is not None:
                data = bytearray(file.read(place.rows * place.row_bytes))
                return torch.frombuffer(data, dtype=dtype).reshape(shape)
            return _dequantised(file, place).reshape(shape)
    except (OSError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{place.path} cannot be read: {' '.join(str(error).split()):.300}") from error


def _dequantised(file: BinaryIO, place: _Place) -> Tensor:
    import gguf

    kind = gguf.GGMLQuantizationType[place.kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    columns = place.row_bytes // size * block
    out = torch.empty(place.rows, columns, dtype=torch.float16)
    step = max(1, CHUNK // columns)
    for row in range(0, place.rows, step):
        count = min(step, place.rows - row)
        data = np.frombuffer(file.read(count * place.row_bytes), np.uint8).reshape(count, -1)
        values = in_16_bits(torch.from_numpy(np.ascontiguousarray(gguf.dequantize(data, kind))))
        out = out.to(torch.promote_types(out.dtype, values.dtype))
        out[row : row + count] = values
    return out
