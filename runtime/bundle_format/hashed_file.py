"""A file by its path and its SHA-256: what a manifest vouches for, and what a bundle was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ...errors import BundleError
from ...hashed import Identity, identity, sha256_file

LARGEST = {".json": 32 * 2**20, ".onnx": 2**31}
"""Bytes of a file by its suffix, so that no endless one is hashed: what reads them takes no more either."""
LONGEST_PATH = 1000  # characters


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
        raise ValueError(f"the path {file!r:.80} leaves the bundle")
    if len(file) > LONGEST_PATH:
        raise ValueError(f"the path {file!r:.80} is longer than {LONGEST_PATH} characters")
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise ValueError(f"{sha256!r:.80} is not a SHA-256 in hex")


class CheckedFiles:
    """The files of a folder, hashed when they are first asked for, and held to be the same at every use.

    Args: folder: what their paths are relative to; inside: the folder that no link may leave; error: makes an
        error of what is wrong with a file.
    """

    def __init__(self, folder: Path, inside: Path, error: Callable[[str], BundleError]) -> None:
        self.folder = folder
        self._inside = inside
        self._error = error
        self._seen: dict[HashedFile, Identity] = {}

    def check(self, file: HashedFile) -> Path:
        """The path of `file`, which has its SHA-256: it is read again if it is not the file that was read
        before. Raises what `error` makes."""
        path = self.folder / file.file
        try:
            if not path.resolve().is_relative_to(self._inside.resolve()):
                raise self._error(f"{str(path)!r} is a link out of the bundle")
            if not path.is_file():
                raise self._error(f"{str(path)!r} is missing")
            size, most = path.stat().st_size, LARGEST.get(path.suffix)
            if most is not None and size > most:
                raise self._error(f"{str(path)!r} has {size} bytes, more than {most}")
            before = identity(path)
            if self._seen.get(file) != before:
                found = sha256_file(path)
                if found != file.sha256:
                    raise self._error(f"{str(path)!r} has SHA-256 {found}, expected {file.sha256}")
                self._seen[file] = before
                self._same(file)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise BundleError(f"cannot read {str(path)!r}: {reason}") from None
        return path

    @contextmanager
    def reading(self, files: Iterable[HashedFile]) -> Iterator[Path]:
        """Yields the path of the first of `files`; whatever the block reads of them has the SHA-256 that they
        should have, or else it ends in an error. Raises what `error` makes."""
        files = list(files)
        paths = [self.check(file) for file in files]
        yield paths[0]
        for file in files:
            self._same(file)

    def _same(self, file: HashedFile) -> None:
        path = self.folder / file.file
        try:
            same = identity(path) == self._seen[file]
        except OSError:
            same = False
        if not same:
            del self._seen[file]
            raise self._error(f"{str(path)!r} was changed while it was read")
