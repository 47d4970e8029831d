"""Whole folders or none: written in a hidden folder beside their place, and swapped with what is there.

`.NAME.part` beside the place NAME is that hidden folder, one writer's at a time. In it lie

    lock        held by the writer; the kernel releases it when the writer dies
    TOKEN.new   what is being written, and was never at the place: swept
    gone        what was at the place: removed, file by file, as far as this program wrote it
    old         the same where the file system cannot swap: put back while the place is empty

So at any moment the old folder or the new one is whole at the place or, where nothing can be swapped, put
back by the next writer. A folder that holds any file that is not this program's is never replaced.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..atomic_write import check_folder_of, is_open, lock, named, sync
from ..errors import InputError

Files = Callable[[Path], Sequence[str]]
"""Of a folder, the files that this program wrote there: paths below it, with forward slashes, in the order in
which they may go, what tells of the others last. Raises InputError for a folder that is none of this
program's."""


@contextmanager
def replacing_folder(target: Path, files: Files | None = None, *, replace: bool = False) -> Iterator[Path]:
    """Yields a new folder, which takes the place `target` if the block succeeds and goes if not.

    Args: files: what may be replaced, see `Files`; None for nothing; replace: whether it may be, now.
    Raises: InputError as `check_target` does, before the block and again after it, when another process is
        writing to the same place, and when something that is not this program's turned up; OSError.
    """
    target = Path(os.path.abspath(target))
    check_folder_of(target)
    with _only_writer(target) as work:
        _settle(work, target, files)
        check_target(target, files, replace=replace)
        new = work / f"{secrets.token_hex(8)}.new"
        new.mkdir()
        try:
            yield new
            for folder, _, names in os.walk(new, topdown=False):
                for path in (*(Path(folder, name) for name in names), Path(folder)):
                    sync(path)
            _put(new, target, files, replace)
            sync(target.parent)
        except OSError as error:
            if (better := named(error, new, target)) is None:
                raise
            raise better from error
        finally:
            _settle(work, target, files)


def recover(folder: Path, files: Files) -> None:
    """Settles what writers that are dead have left in `folder`, beside the folders that they were to replace.

    Raises: InputError where one is not dead, and as `replacing_folder`.
    """
    for left in folder.glob(".*.part"):
        target = left.with_name(left.name[1 : -len(".part")])
        with _only_writer(target) as work:
            _settle(work, target, files)


def check_target(target: Path, files: Files | None, *, replace: bool) -> os.stat_result | None:
    """What is at `target` and may be replaced; None where nothing is there, or an empty folder.

    Raises: InputError for a link or a file, a folder that may not be replaced or is none of this program's,
        one that holds a file that is not this program's, and where the folder around it is missing or
        read-only.
    """
    check_folder_of(target)
    try:
        with suppress(FileNotFoundError):
            os.lstat(_hidden(target))  # whose name is longer, and may be too long
        found = os.lstat(target)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot write {str(target)!r}: {reason}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise InputError(f"cannot write {str(target)!r}: something that is no folder has this name")
    if not os.listdir(target):
        return None
    if files is None:
        raise InputError(f"{str(target)!r} is there already: choose another place")
    own = files(target)
    if not replace:
        raise InputError(f"{str(target)!r} is there already: --overwrite replaces it")
    _refuse_others(target, own)
    return found


def remove(folder: Path, own: Sequence[str]) -> None:
    """Removes the files `own` below `folder`, in this order, and then every folder that is empty."""
    there = set(_contents(folder))  # a name may be made to lead out of the folder
    for name in own:
        if name in there:
            (folder / name).unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(place)


def link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or a copy where the file system has no such links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _hidden(target: Path) -> Path:
    """The folder beside `target` in which a writer works."""
    return target.with_name(f".{target.name}.part")


def _contents(folder: Path) -> list[str]:
    """Everything below `folder` but folders: paths with forward slashes. Links are not followed."""
    found = []
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*links, *names)]
    return sorted(found)


def _refuse_others(folder: Path, own: Sequence[str]) -> None:
    """Raises InputError where `folder` holds anything but folders and the files `own`."""
    others = [name for name in _contents(folder) if name not in set(own)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise InputError(
            f"{str(folder)!r} holds what conceptmaster did not write there, and would be lost: "
            f"{', '.join(map(repr, others[:3]))}{more}; move it away, or choose another place"
        )


@contextmanager
def _only_writer(target: Path) -> Iterator[Path]:
    """The hidden folder beside `target`, of this process alone."""
    work = _hidden(target)
    busy = InputError(f"another process is writing {str(target)!r}: wait until it has ended")
    while True:
        made = True
        try:
            work.mkdir()
        except FileExistsError:
            made = False
        if not stat.S_ISDIR(os.lstat(work).st_mode):
            raise InputError(f"{str(work)!r} is in the way: move it")
        try:
            held = os.open(work / "lock", os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # another writer has just ended
            continue
        try:
            free = lock(held)
            if free is False:
                raise busy
            if free is None and not made:  # no locks here: a folder that is there may be a living writer's
                raise InputError(f"{busy}, or delete {str(work)!r} if none is")
            if not is_open(held, work / "lock"):
                continue
            try:
                yield work
            finally:
                with suppress(OSError):  # what could not be settled keeps the folder
                    (work / "lock").unlink()
                    work.rmdir()
            return
        finally:
            os.close(held)


def _settle(work: Path, target: Path, files: Files | None) -> None:
    """Leaves nothing in `work`, whatever a writer was doing when it ended, see the module's text."""
    old, gone, new = work / "old", work / "gone", list(work.glob("*.new"))
    if old.exists():
        if not os.path.lexists(target):
            os.rename(old, target)
            sync(target.parent)
        elif new:  # it did not get there
            raise InputError(
                f"{str(target)!r} has appeared; what was there before is {str(old)!r}: move one of them"
            )
        else:
            os.rename(old, gone)
    for folder in new:
        shutil.rmtree(folder)
    if gone.exists():
        own = files(gone) if files is not None and _contents(gone) else ()
        _refuse_others(gone, own)
        remove(gone, own)


def _put(new: Path, target: Path, files: Files | None, replace: bool) -> None:
    """Puts `new` at `target`, and what was there beside `new`."""
    found = check_target(target, files, replace=replace)
    if found is None:
        _move(new, target)
        return
    os.chmod(new, stat.S_IMODE(found.st_mode))
    gone, old = new.with_name("gone"), new.with_name("old")
    os.rename(new, gone)
    if _exchange(gone, target):
        try:
            _check_same(gone, target, found, files)
        except BaseException:
            _exchange(gone, target)
            os.rename(gone, new)
            raise
        return
    os.rename(gone, new)
    os.rename(target, old)
    _check_same(old, target, found, files)
    _move(new, target)


def _move(new: Path, target: Path) -> None:
    """Puts `new` where nothing is. Raises InputError where something is by now."""
    try:
        os.rename(new, target)  # a folder takes no other place than that of an empty one
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise InputError(f"{str(target)!r} has appeared meanwhile: choose another place") from None


def _check_same(aside: Path, target: Path, found: os.stat_result, files: Files | None) -> None:
    """Raises InputError unless `aside` is what was found at `target`, with nothing else in it by now."""
    if not os.path.samestat(os.lstat(aside), found):
        raise InputError(f"{str(target)!r} has been replaced meanwhile: nothing was written")
    assert files is not None
    _refuse_others(aside, files(aside))


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders at once; False where the system or the file system cannot. Raises OSError."""
    name, flag, around = ("renamex_np", 2, ()) if sys.platform == "darwin" else ("renameat2", 2, (-100,))
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None) if os.name == "posix" else None
    if function is None:
        return False
    if function(*around, os.fsencode(one), *around, os.fsencode(other), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
