"""A file by its path and its SHA-256: what a manifest vouches for, and what a bundle was made from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath


@dataclass(frozen=True)
class HashedFile:
    """A file: its path relative to the folder that it belongs to, with forward slashes, and its SHA-256 in
    hex."""

    file: str
    sha256: str

    def __post_init__(self) -> None:
        check_file(self.file, self.sha256)


def check_file(file: str, sha256: str) -> None:
    """Raises ValueError for a path that is not inside its folder, and for what is no SHA-256."""
    parts = PurePosixPath(file).parts
    outside = (
        file.startswith("/")
        or "\\" in file
        or "\0" in file
        or ".." in parts
        or bool(PureWindowsPath(file).drive)
    )
    if not parts or outside:
        raise ValueError(f"the path {file!r} leaves the bundle")
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise ValueError(f"{sha256!r:.80} is not a SHA-256 in hex")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in lower-case hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
