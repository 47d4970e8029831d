"""A bundle: a folder with a manifest, ONNX graphs and a tokenizer. Opening one verifies every file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError
from . import manifest as manifests
from .hashed_file import CheckedFiles
from .schema import Manifest

if TYPE_CHECKING:
    from ..custom import Custom

SHIPPED = Path(__file__).parents[1] / "bundles"  # the bundles that come with the package, one folder each


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. `folder`, an absolute path, holds the files that `manifest` names; `files` looks at
    them again where they are used. `custom`: what is handed in beside it, None where nothing is."""

    folder: Path
    manifest: Manifest
    files: CheckedFiles = field(repr=False, compare=False)
    custom: Custom | None = None

    @classmethod
    def open(cls, name_or_path: str | os.PathLike[str]) -> Bundle:
        """Finds and verifies a bundle.

        Args: name_or_path: the name of a shipped bundle ("stickers"), which wins over a folder of that name
            here (write "./stickers" for the folder), or a path.
        Raises: InputError when there is no such bundle; BundleError when it is there but not sound.
        """
        folder = _find(name_or_path)
        return cls(folder, *manifests.load_checked(folder))

    def with_graphs(self) -> Bundle:
        """This bundle. Raises InputError where it was exported without graphs."""
        if not self.manifest.has_graphs:
            raise InputError(
                f"{str(self.folder)!r} was exported without graphs: run it with --backend torch, or "
                "export it again"
            )
        return self

    def with_custom(self, paths: Sequence[str | os.PathLike[str]]) -> Bundle:
        """This bundle with deltas handed in (see custom.py); itself for none. Raises InputError for one that
        is not for it, MissingDependency."""
        if not paths:
            return self
        from ..custom import hand_in

        return replace(self, custom=hand_in(self, paths))

    @contextmanager
    def reading(self, graph: str) -> Iterator[Path]:
        """Yields the ONNX file of `graph`, to be loaded in the block: it and its weights are still what they
        were when they were hashed, or else this ends in a BundleError. Raises KeyError."""
        with self.files.reading(self.manifest.graphs[graph].files()) as path:
            yield path

    @property
    def tokenizer(self) -> Path:
        """The file tokenizer.json. Raises BundleError when it has been changed."""
        return self.files.check(self.manifest.tokenizer)


def shipped() -> list[str]:
    """The names of the bundles that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{manifests.FILE_NAME}"))


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InputError(f"a bundle is named by a string or a path, not {type(name_or_path).__name__}")
    if name_or_path in shipped():
        return SHIPPED / name_or_path
    folder = Path(name_or_path)
    try:
        if (folder / manifests.FILE_NAME).is_file():
            return folder.absolute()  # found after os.chdir, too
        exists = folder.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        exists = False
    if exists:
        raise InputError(f"{str(folder)!r} is not a bundle: it has no {manifests.FILE_NAME}")
    names = ", ".join(shipped()) or "none"
    raise InputError(f"no bundle {str(folder)!r}: neither a folder nor a shipped bundle (shipped: {names})")
