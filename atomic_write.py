"""Whole files or none: outputs are written beside their place and moved there when they are complete.

What a killed writer leaves beside the place is swept by the next one that writes there: a living writer holds
a lock on its file, which the kernel releases when it dies. Folders: see atomic_folder.py.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


_hashes: ContextVar[dict[Path, str] | None] = ContextVar("hashes", default=None)


@contextmanager
def hashing() -> Iterator[dict[Path, str]]:
    """Yields the SHA-256, in hex, of every file that this thread writes in the block with `replacing`, by the
    path that was given: of what was written, whatever lies there by now."""
    found: dict[Path, str] = {}
    token = _hashes.set(found)
    try:
        yield found
    finally:
        _hashes.reset(token)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` (same suffix); moves it onto `path` if the block succeeds and
    deletes it if the block fails or is interrupted, so nobody ever sees half a file.

    A link at `path` stays, and what it leads to is written. A file that is replaced keeps its permissions; a
    new one has those that the umask gives.

    Raises: InputError for what `check_replaceable` refuses; OSError, which names `path`, when it cannot be
        written.
    """
    check_replaceable(path)
    place = Path(os.path.realpath(path))
    temporary, held = _claim(place)
    moved = False
    try:
        try:
            new = os.stat(temporary)
            yield temporary
            found = check_replaceable(place)
            if found is not None:
                with suppress(OSError):  # another owner's: only root can give it back
                    os.chown(temporary, found.st_uid, found.st_gid)
            os.chmod(temporary, stat.S_IMODE((found or new).st_mode))  # safetensors makes secret ones
            sync(temporary)
            if (hashes := _hashes.get()) is not None:
                with temporary.open("rb") as file:
                    hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
            os.replace(temporary, place)
            moved = True  # its old name may be another writer's by now
            sync(place.parent)
        except OSError as error:
            if (better := named(error, temporary, path)) is None:
                raise
            raise better from error
    finally:
        if not moved:
            temporary.unlink(missing_ok=True)
        if held is not None:
            os.close(held)


def check_output(path: Path, suffixes: tuple[str, ...]) -> Path:
    """Says early that `path` could not be written later.

    Args: path: the file to be written; suffixes: the endings allowed, each with its dot, lower case.
    Returns: `path`.
    Raises: InputError for another suffix, a missing or read-only folder, and as `check_replaceable`.
    """
    if path.suffix.lower() not in suffixes:
        raise InputError(f"cannot write {str(path)!r}: the name must end in {', '.join(suffixes)}")
    check_replaceable(path)
    check_folder_of(Path(os.path.realpath(path)) if path.is_symlink() else path)
    return path


def check_replaceable(path: Path) -> os.stat_result | None:
    """What `path` leads to, which a file may replace; None where nothing is there.

    Raises: InputError for a folder, a pipe, a device, a file that is read-only (also to root, whom
        permissions do not stop), and a path that cannot be.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # too long, a loop of links, no folder before it
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot write {str(path)!r}: {reason}") from None
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise InputError(f"cannot write {str(path)!r}: it is {what}")
    if not found.st_mode & 0o222:
        raise InputError(f"cannot write {str(path)!r}: it is read-only")
    if not os.access(path, os.W_OK):
        raise InputError(f"cannot write {str(path)!r}: there is no permission to")
    return found


def check_folder_of(path: Path) -> None:
    """Raises InputError where the folder that `path` would be written into is missing or read-only."""
    try:
        there = path.parent.is_dir()
    except (OSError, ValueError):
        there = False
    if not there:
        raise InputError(f"cannot write {str(path)!r}: the folder {str(path.parent)!r} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {str(path)!r}: the folder {str(path.parent)!r} is not writable")


def sync(path: Path) -> None:
    """Waits until a file, or which names a folder has, is on the disk. Raises OSError."""
    if os.name != "posix" and path.is_dir():  # Windows opens no folders
        return
    opened = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(opened)


def lock(opened: int) -> bool | None:
    """Takes the lock of an open file, until it is closed or this process ends: whether this succeeds, None
    where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network's file system without them
        return None
    return True


def is_open(opened: int, path: Path) -> bool:
    """Whether `path` is the open file, not another one, nor gone."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(opened))


def _claim(place: Path) -> tuple[Path, int | None]:
    """A new file beside `place`, and its locked descriptor, None without locks; what dead writers left there
    is swept."""
    key = hashlib.sha256(os.fsencode(place.name)).hexdigest()[:16]  # the name itself may be too long
    number = 0
    while True:
        temporary = place.with_name(f".{key}.{number}.part{place.suffix}")
        try:
            held = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)  # the umask applies
        except FileExistsError:
            number += not _sweep(temporary)
            continue
        locked = lock(held)
        if locked and is_open(held, temporary):
            return temporary, held
        os.close(held)
        if locked is None:
            return temporary, None  # and Windows could not move an open file


def _sweep(temporary: Path) -> bool:
    """Deletes a file whose writer is dead. Returns whether it is gone."""
    try:
        opened = os.open(temporary, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    try:
        dead = bool(lock(opened)) and is_open(opened, temporary)
        if dead:
            temporary.unlink()
        return dead
    finally:
        os.close(opened)


def named(error: OSError, temporary: Path, path: Path) -> OSError | None:
    """`error` about a file at or below `temporary`, with the path that was asked for instead; None of others.

    Where a library has lost the reason, as NumPy does on a full disk, a write of our own asks for it again.
    """
    given = (error.filename, error.filename2)
    names = [os.fsdecode(name) for name in given if isinstance(name, str | bytes | os.PathLike)]
    if names and not any(Path(name).is_relative_to(temporary) for name in names):
        return None
    code = error.errno
    if code is None and type(error) is OSError:
        try:
            with (temporary / ".probe" if temporary.is_dir() else temporary).open("ab") as file:
                file.write(bytes(1 << 16))
        except OSError as again:
            code = again.errno
    if code is None or code not in errno.errorcode:
        return None
    return OSError(code, os.strerror(code), str(path))
