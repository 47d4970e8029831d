"""Whole files or none: outputs are written beside their place and moved there when they are complete."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in `path`'s folder (same suffix); moves it onto `path` if the block succeeds
    and deletes it if the block fails or is interrupted, so nobody ever sees half a file.

    Raises: OSError when the folder cannot be written.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}{path.suffix}"
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the caller's umask applies
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: Path, suffixes: tuple[str, ...]) -> Path:
    """Says early that `path` could not be written later.

    Args: path: the file to be written; suffixes: the endings allowed, each with its dot, lower case.
    Returns: `path`.
    Raises: InputError for another suffix, a missing or read-only folder, or a folder in the file's place.
    """
    if path.suffix.lower() not in suffixes:
        raise InputError(f"cannot write {str(path)!r}: the name must end in {', '.join(suffixes)}")
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        is_folder = False
    except OSError as error:  # a name too long, a file where a folder should be
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from None
    if is_folder:
        raise InputError(f"cannot write {str(path)!r}: it is a folder")
    check_folder_of(path)
    return path


def check_folder_of(path: Path) -> None:
    """Raises InputError where the folder that `path` would be written into is missing or read-only."""
    if not path.parent.is_dir():
        raise InputError(f"cannot write {str(path)!r}: the folder {str(path.parent)!r} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {str(path)!r}: the folder {str(path.parent)!r} is not writable")
