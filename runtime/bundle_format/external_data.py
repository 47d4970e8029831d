"""Which files an ONNX graph reads its weights from, found in its protobuf without any of them being read."""

from __future__ import annotations

import mmap
from pathlib import Path

LARGEST = 2**22
"""Fields that are looked at; a graph of 10,000 nodes has a tenth of it."""

# By message of onnx.proto, its fields that may hold, somewhere below, an entry of a tensor's external data.
_MESSAGES = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Tensor": {13: "Entry"},
    "Entry": {1: "key", 2: "value"},
}
_FIXED = {1: 8, 5: 4}  # bytes of the wire types that have no length


def locations(graph: Path) -> set[str]:
    """The paths, relative to the graph's folder, of the files that the graph at `graph` names.

    Raises: ValueError for what is no protobuf, or too large a one; OSError.
    """
    with graph.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            return set()
        with data:
            return _locations(data)


def _locations(data: mmap.mmap) -> set[str]:
    found, fields = set(), 0
    parts = [("Model", 0, len(data))]
    while parts:
        message, place, end = parts.pop()
        inner, entry = _MESSAGES[message], dict[str, bytes]()
        while place < end:
            fields += 1
            if fields > LARGEST:
                raise ValueError(f"has more than {LARGEST} entries")
            tag, place = _number(data, place, end)
            field, wire = tag >> 3, tag & 7
            if wire == 0:
                _, place = _number(data, place, end)
                continue
            if wire == 2:
                size, place = _number(data, place, end)
            elif wire in _FIXED:
                size = _FIXED[wire]
            else:
                raise ValueError("is not a graph")
            if size > end - place:
                raise ValueError("is cut off")
            if wire == 2 and message == "Entry" and field in inner:
                entry[inner[field]] = data[place : place + size]
            elif wire == 2 and field in inner:
                parts.append((inner[field], place, place + size))
            place += size
        if entry.get("key") == b"location":
            found.add(entry.get("value", b"").decode("utf-8", "replace"))
    return found


def _number(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    found = shift = 0
    while place < end and shift < 70:
        byte = data[place]
        place += 1
        found |= (byte & 127) << shift
        if byte < 128:
            return found, place
        shift += 7
    raise ValueError("is cut off")
