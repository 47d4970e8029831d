"""A bundle's way to a node: once for each node, by what it is, whole or not at all.

Where the path that it has on the server's machine leads to the same bundle on the node, as on a shared disk,
it is used in place. Elsewhere it is read in pieces from a `Source` on the server's machine into a cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...atomic_write import sync
from ...errors import BundleError, InputError
from ...hashed import sha256_file
from ..atomic_folder import replacing_folder
from ..bundle_format import manifest as manifests
from ..bundle_format import tensorrt_engines
from ..bundle_format.find import Bundle
from ..bundle_format.hashed_file import check_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PIECE = 16 * 2**20  # bytes
AT_ONCE = 4  # pieces that are on their way
Read = Callable[[str, int], Awaitable[bytes]]
"""Of a file, by its path below the bundle, the piece that begins at a byte; empty behind the end."""


@dataclass(frozen=True)
class Parcel:
    """What a node needs to know of a bundle: where it is on the server's machine, the SHA-256 and the size of
    each of its files, and the SHA-256 of these, which it is called by."""

    place: str
    digest: str
    files: dict[str, tuple[str, int]]

    @classmethod
    def of(cls, place: str) -> Parcel:
        """Of the bundle at `place`, every file of which is looked at. Raises what Bundle.open raises."""
        bundle = Bundle.open(place)
        hashes = {manifests.FILE_NAME: sha256_file(bundle.folder / manifests.FILE_NAME)}
        hashes |= {file.file: file.sha256 for file in bundle.manifest.files()}
        for engines in tensorrt_engines.built(bundle.folder):
            folder = Path(tensorrt_engines.FOLDER, engines.folder_name)
            record = folder / tensorrt_engines.FILE_NAME
            hashes[record.as_posix()] = sha256_file(bundle.folder / record)
            hashes |= {(folder / e.file).as_posix(): e.sha256 for e in engines.engines.values()}
        digest = hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode())
        sizes = {name: (bundle.folder / name).stat().st_size for name in hashes}
        return cls(place, digest.hexdigest(), {name: (hashes[name], sizes[name]) for name in hashes})

    def is_at(self, folder: Path) -> bool:
        """Whether this bundle is there, as far as its manifests tell; who opens it looks at all of it."""
        try:
            return all(
                (folder / name).stat().st_size == size
                and (not name.endswith(".json") or sha256_file(folder / name) == sha256)
                for name, (sha256, size) in self.files.items()
            )
        except (OSError, ValueError):
            return False


class Source:
    """Reads a bundle's files, on the server's machine."""

    def __init__(self, parcel: Parcel) -> None:
        self._parcel = parcel

    def read(self, name: str, start: int) -> bytes:
        """See `Read`. Raises KeyError for what is none of its files, OSError."""
        self._parcel.files[name]
        with Path(self._parcel.place, name).open("rb") as file:
            file.seek(start)
            return file.read(PIECE)


def cache() -> Path:
    """The folder of bundles that were fetched, on this machine."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "conceptmaster" / "bundles"


def at_hand(parcel: Parcel) -> Path | None:
    """Where the bundle is on this machine, None where it is not yet."""
    return next((f for f in (Path(parcel.place), cache() / parcel.digest) if parcel.is_at(f)), None)


def sound(folder: Path) -> bool:
    """Whether a bundle is there, every file of which is as its manifest says."""
    try:
        manifests.load(folder)
    except BundleError:
        return False
    return True


async def fetch(parcel: Parcel, read: Read) -> Path:
    """Brings the bundle into the cache, unless it is there, and is sound; several at once wait for one.

    Raises: BundleError for what is not what it should be, InputError and OSError where it cannot be kept.
    """
    target = cache() / parcel.digest
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{parcel.digest}.lock").open("a") as held:
        if fcntl is not None:
            await asyncio.to_thread(fcntl.flock, held, fcntl.LOCK_EX)
        if not await asyncio.to_thread(sound, target):
            await asyncio.to_thread(_replace, target, parcel, _Pieces(read, asyncio.get_running_loop()))
    return target


class _Pieces:
    """Reads ahead: some pieces are on their way while one is written, in another thread than the loop's."""

    def __init__(self, read: Read, loop: asyncio.AbstractEventLoop) -> None:
        self._read, self._loop = read, loop

    def of(self, name: str, size: int) -> Iterator[bytes]:
        """The pieces of one file, in order."""
        asked = []
        for start in range(0, size, PIECE):
            asked.append(asyncio.run_coroutine_threadsafe(self._one(name, start), self._loop))
            if len(asked) == AT_ONCE:
                yield asked.pop(0).result()
        for one in asked:
            yield one.result()

    async def _one(self, name: str, start: int) -> bytes:
        return await self._read(name, start)


def _replace(target: Path, parcel: Parcel, pieces: _Pieces) -> None:
    needed = sum(size for _, size in parcel.files.values())
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise InputError(f"the bundle takes {needed} bytes, and {str(target.parent)!r} has {free} left")
    with replacing_folder(target, _all, replace=True) as new:
        for name, (sha256, size) in parcel.files.items():
            check_file(name, sha256)
            path, found = new / name, hashlib.sha256()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for piece in pieces.of(name, size):
                    file.write(piece)
                    found.update(piece)
            sync(path)
            if found.hexdigest() != sha256:
                raise BundleError(
                    f"{name!r} came with SHA-256 {found.hexdigest()}, expected {sha256}: it was changed at "
                    f"{parcel.place!r}"
                )


def _all(folder: Path) -> list[str]:
    """Everything in a folder of the cache, which nobody else writes to."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
