"""A file's SHA-256, and whether the file is still the one that had it. Everybody may import this module."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .untrusted import open_plain

Identity = tuple[int, ...]

MOST_AT_ONCE = 8
"""Files that are hashed side by side."""


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in lower-case hex. Raises OSError, ValueError for no regular file."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 by file of those below `folder`, several at a time: one alone is slower than most disks. Raises
    as `sha256_file`."""
    from concurrent.futures import ThreadPoolExecutor  # which most of what imports this file never needs

    files = list(files)
    with ThreadPoolExecutor(min(MOST_AT_ONCE, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(lambda file: sha256_file(folder / file), files), strict=True))


def identity(path: str | os.PathLike[str]) -> Identity:
    """What differs once another file lies at `path`, another link leads from there, or the file was written
    to: device, inode, size and times of change of the link, or the file, and of what it leads to.

    Raises: OSError.
    """
    fields = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
    return tuple(getattr(found, name) for found in (os.lstat(path), os.stat(path)) for name in fields)


def identities(paths: Iterable[Path]) -> dict[Path, Identity]:
    """The identity of each file that is there. Raises OSError."""
    return {path: identity(path) for path in paths if path.exists()}


def require_same(before: Mapping[Path, Identity]) -> None:
    """Raises ValueError where a file is not what it was before, OSError where one is gone."""
    for path, found in before.items():
        if identity(path) != found:
            raise ValueError(f"{str(path)!r} was changed while it was read")
