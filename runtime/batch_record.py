"""What a batch remembers of a line, beside its video: what was asked for, and the files that were made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_write import replacing
from ..errors import InputError
from ..untrusted import open_plain, read_json
from .bundle_format.manifest import FILE_NAME
from .bundle_format.strict_json import checksum

if TYPE_CHECKING:
    from .bundle_format.find import Bundle
    from .bundle_format.schema import Manifest
    from .outputs import Outputs
    from .request import Request


def place(video: Path) -> Path:
    """Where the record of a line lies whose video has this name (with {seed} as it is)."""
    return video.with_name(f".{video.name}.json")


@dataclass(frozen=True)
class Asked:
    """What all lines of a batch have in common. common: JSON values, all that changes what is made besides
    the request."""

    manifest: Manifest
    common: Mapping[str, Any]

    @classmethod
    def of(cls, bundle: Bundle, common: Mapping[str, Any]) -> Asked:
        """Of a verified bundle, whose manifest vouches for its files."""
        return cls(bundle.manifest, {**common, "bundle": _sha256(bundle.folder / FILE_NAME)})

    def key(self, request: Request) -> str:
        """A hash of all that was asked for: the resolved request, the bytes of its pictures, what is common.

        Raises: InputError for what the bundle cannot follow, and a picture that cannot be read.
        """
        resolved, _ = request.resolve(self.manifest)
        fields = {f.name: getattr(resolved, f.name) for f in dataclasses.fields(resolved)}
        if resolved.guidance_2 is None:
            del fields["guidance_2"]  # so that records of before it was there still say the same
        if not resolved.boxes:
            del fields["boxes"]
        fields["concepts"] = [[c.label, _picture(c.label, c.image)] for c in resolved.concepts]
        return checksum({"request": fields, **self.common})

    def made(self, request: Request, outputs: Outputs, record: Path) -> bool:
        """Whether an earlier run has made just this, and all of its files are whole. Raises as `key`."""
        key = self.key(request)
        try:
            found = read_json(record)
            hashes = found["files"] if found["asked"] == key else {}
            return all(hashes[_name(path, record)] == _sha256(path) for path in outputs.all())
        except (OSError, ValueError, KeyError, TypeError):  # none, of another request, or no record at all
            return False


def write(record: Path, key: str, hashes: Mapping[Path, str]) -> None:
    """Writes a record, when all else is written. hashes: SHA-256 by file. Raises OSError."""
    files = {_name(path, record): sha256 for path, sha256 in hashes.items()}
    with replacing(record) as temporary:
        temporary.write_text(json.dumps({"asked": key, "files": files}, indent=1) + "\n", encoding="utf-8")


def _name(path: Path, record: Path) -> str:
    """As a record has it: it may be moved, together with its files."""
    return Path(os.path.relpath(path, record.parent)).as_posix()


def _picture(label: str, image: Any) -> str:
    try:
        return _sha256(image)
    except OSError as error:
        reason = error.strerror
    except ValueError as error:
        reason = str(error)
    raise InputError(f"the picture of {label!r} {os.fspath(image)!r}: {reason}")


def _sha256(path: str | os.PathLike[str]) -> str:
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
