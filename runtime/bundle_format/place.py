"""Where a bundle may be written: a place that is free, or a bundle that holds nothing but what is listed."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ..atomic_folder import check_target, recover
from . import strict_json
from . import tensorrt_engines as stored
from .manifest import FILE_NAME
from .schema import FORMAT, Manifest


def check_place(folder: Path, overwrite: bool) -> None:
    """Says early that no bundle could be put at `folder` later, and settles what builds of engines that were
    killed have left in the one that is there.

    Raises: InputError, see `check_target` and `bundle_files`; BundleError.
    """
    if overwrite and (folder / stored.FOLDER).is_dir() and not folder.is_symlink():
        bundle_files(folder)  # in a folder of others nothing is touched
        recover(folder / stored.FOLDER, stored.files)
    check_target(folder, bundle_files, replace=overwrite)


def bundle_files(folder: Path) -> list[str]:
    """The files of the bundle in `folder` that this program wrote, engines among them, manifest.json last.

    Raises: InputError for a folder that is no bundle of this program's; BundleError for an unreadable
        engines.json.
    """
    try:
        bundle = strict_json.load(Manifest, folder / FILE_NAME, FORMAT)
    except FileNotFoundError:
        raise InputError(f"{str(folder)!r} is not empty and not a bundle: choose another place") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{str(folder)!r} is not a bundle that can be replaced: {FILE_NAME}: {reason}; choose another "
            "place, or move it away"
        ) from None
    places = [path.parent for path in sorted((folder / stored.FOLDER).glob(f"*/{stored.FILE_NAME}"))]
    engines = [f"{stored.FOLDER}/{place.name}/{name}" for place in places for name in stored.files(place)]
    return [*(file.file for file in bundle.files()), *engines, FILE_NAME]
