"""Reads JSON into frozen dataclasses and refuses whatever it does not expect; writes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from ...atomic_write import replacing
from ...untrusted import read_json

T = TypeVar("T")


def load(kind: type[T], path: Path, newest: int) -> T:
    """Reads what `save` wrote; the key "format" may be at most `newest`.

    Raises: ValueError as `untrusted.read_json` and `decode` do, for a newer format, and for contents that
        differ from their own checksum; OSError.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError("is not an object")
    found = data.get("format")
    if type(found) is int and found > newest:
        raise ValueError(
            f"has format {found}, this conceptmaster reads formats up to {newest}: upgrade conceptmaster"
        )
    expected = data.pop("checksum", None)
    value = decode(kind, data, path.stem)
    if expected != checksum(data):
        raise ValueError("differs from its own checksum: it was changed or damaged after it was written")
    return value


def save(value: Any, path: Path) -> Path:
    """Writes a dataclass with its checksum, whole or not at all; what is None at the top is left out.

    Returns: `path`. Raises OSError, ValueError for NaN.
    """
    data = {key: item for key, item in encode(value).items() if item is not None}
    data["checksum"] = checksum(data)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value (sorted keys, no spaces), for checksums. Raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def checksum(value: Any) -> str:
    """SHA-256 of a JSON value, however it is spelled, in lower-case hex. Raises ValueError for NaN."""
    return hashlib.sha256(canonical(value)).hexdigest()


def stored_as(key: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass's field that JSON has under another name."""
    return dataclasses.field(default=default, metadata={"key": key})


def added(default: Any) -> Any:
    """A field that a later format brought. Where it has its default it is not written: who reads older
    formats alone, and refuses keys that these do not have, reads what needs nothing new."""
    return dataclasses.field(default=default, metadata={"added": True})


def encode(value: Any) -> Any:
    """The JSON value of a dataclass: what `decode` reads."""
    if dataclasses.is_dataclass(value):
        return {
            _key(field): encode(item)
            for field in dataclasses.fields(value)
            if (item := getattr(value, field.name)) != field.default or not field.metadata.get("added")
        }
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, (tuple, list)) else value


def _key(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def decode(kind: type[T], value: Any, where: str) -> T:
    """Turns a parsed JSON value into `kind`: a dataclass, int, float, str, bool, tuple[...], dict[str, ...],
    X | None, or dict (left as it is). Types are exact: true is no integer, 1.0 is no integer, 1 is a float.

    Args: where: what the value is, for messages.
    Raises: ValueError naming the place, for an unknown or missing key or a wrong type.
    """
    return typing.cast(T, _decode(kind, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin in (types.UnionType, typing.Union):  # only X | None
        if value is None:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _decode(inner, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"{where} must have {len(arguments)} entries, it has {len(value)}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(
            _decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if kind is dict or origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object")
        if not arguments:
            return value
        return {key: _decode(arguments[1], item, f"{where}.{key:.60}") for key, item in value.items()}
    if kind is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {_NAMES[kind]}, it is {value!r:.60}")
    return value


_NAMES: dict[Any, str] = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object")
    fields = {_key(field): field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise ValueError(f"{where} has an unknown key {key!r:.60}")
    for key, field in fields.items():
        if key not in value and field.default is dataclasses.MISSING:
            raise ValueError(f"{where} lacks the key {key!r}")
    hints = typing.get_type_hints(kind)
    names = {key: fields[key].name for key in value}
    decoded = {name: _decode(hints[name], value[key], f"{where}.{key}") for key, name in names.items()}
    try:
        return kind(**decoded)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
