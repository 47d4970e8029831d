"""What others wrote, handled with care: plain files, JSON of bounded size and depth, text that is shown.

Names, sizes and characters that come from a file are whatever its writer liked. Everybody may import this
module, as errors.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

LARGEST_JSON = 4 * 2**20  # bytes; a manifest, a request or a configuration is a few kilobytes
DEEPEST_JSON = 64  # objects and lists in each other; a configuration has four
LONGEST_TEXT = 4000  # characters of a message

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # JSON's way of writing half of a surrogate pair


def printable(text: object, most: int = LONGEST_TEXT) -> str:
    """`text` in one line for a terminal: control characters, escape sequences, invisible characters and lone
    surrogates as Python spells them, and cut where it is longer than `most`."""
    line = str(text)
    line = line if len(line) <= most else f"{line[:most]}…"
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def shell_word(word: str | os.PathLike[str]) -> str:
    """A path or another argument as a command that is offered for pasting has it: quoted, and no option."""
    text = os.fspath(word)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def open_plain(path: str | os.PathLike[str], pipes: bool = False) -> BufferedReader:
    """Opens a regular file for reading; what is something else is refused without waiting for it.

    pipes: take a pipe, too, as a shell's `<(…)` is one. Raises OSError; ValueError for anything else.
    """
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except UnicodeEncodeError:
        raise ValueError("has a name that is no text") from None
    try:
        mode = os.fstat(file).st_mode
        if pipes and stat.S_ISFIFO(mode):
            os.set_blocking(file, True)
        elif stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        elif not stat.S_ISREG(mode):
            raise ValueError("is not a regular file")
        return open(file, "rb")
    except BaseException:
        os.close(file)
        raise


def read_plain(path: str | os.PathLike[str], most: int, pipes: bool = False) -> bytes:
    """All of a file of at most `most` bytes. Raises as `open_plain`, and ValueError for a larger one."""
    with open_plain(path, pipes) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"is larger than {most} bytes")
    return data


def read_json(path: Path, most: int = LARGEST_JSON, pipes: bool = False) -> Any:
    """The value in a JSON file. Raises as `read_plain` and `parse_json`; messages begin with a verb."""
    return parse_json(read_plain(path, most, pipes))


def parse_json(data: bytes | str) -> Any:
    """The value that JSON says.

    Raises: ValueError for what is not UTF-8 or not JSON, is nested too deeply, repeats a key in an object, or
        holds NaN, Infinity or half a surrogate pair.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, line {error.lineno})") from None
    except ValueError as error:  # ours, and Python's for a number of more digits than it reads
        told = "holds a number of thousands of digits" if "int_max_str_digits" in str(error) else str(error)
        raise ValueError(told) from None
    _check_depth(value)
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is no text") from None
    return value


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST_JSON + 1):
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return
        level = [x for item in level for x in (item.values() if isinstance(item, dict) else item)]
    raise ValueError("is nested too deeply")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"has the key {twice!r:.60} twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"holds {name}, which is not JSON")
