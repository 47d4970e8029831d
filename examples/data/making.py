"""Pairs out of a folder of videos: every video through every stage, then lists, report and contact sheet."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conceptmaster.atomic_write import lock, replacing
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.world.requesting import make_folder
from conceptmaster.runtime.progress import each
from conceptmaster.untrusted import read_json

from . import contact_sheet, report
from .films import SUFFIXES
from .pairs import read_pairs, write_lists
from .parts import Parts
from .stages import Result, Run, Work, work_on
from .taxonomy import Taxonomy
from .thresholds import Thresholds

MARK = "made-by-conceptmaster.json"
MARKED = {"what": "pairs of conceptmaster.examples.data", "format": 1}


def make(
    videos: Path, output: Path, thresholds: Thresholds, taxonomy: Taxonomy, parts: Parts, show: bool = False
) -> dict[str, Any]:
    """Makes what is not made yet; returns the report, see `report.build`.

    Raises: InputError as `check`; OSError when writing fails.
    """
    found = check(videos, output)
    with _only_writer(output):
        with replacing(output / MARK) as temporary:
            temporary.write_text(
                f'{{"what": "{MARKED["what"]}", "format": {MARKED["format"]}}}\n', encoding="utf-8"
            )
        run = Run(output, thresholds, taxonomy, parts)
        results: dict[str, dict[str, Result]] = {}
        for path in each(found, "videos", show):
            name = path.relative_to(videos).as_posix()
            results[name] = work_on(Work(run, _own(name), path))
        lines = (
            {"video": video, **{key: value for key, value in line.items() if key != "shot"}}
            for video, by in results.items()
            for line in by.get("pairs", ([], []))[0]
        )
        write_lists(output, lines)
        told = report.build(results, thresholds, parts)
        report.write(told, output)
        contact_sheet.save(read_pairs(output), output / "sheet.png")
    return told


def check(videos: Path, output: Path) -> list[Path]:
    """The videos of a folder and of those in it. Raises InputError where there is none, and for an output
    folder that cannot be made, holds something else, or lies among the videos."""
    if not videos.is_dir():
        raise InputError(f"there is no folder {str(videos)!r} of videos")
    if output.resolve().is_relative_to(videos.resolve()):
        raise InputError(f"{str(output)!r} lies among the videos: its clips would be taken for some")
    try:
        marked = read_json(output / MARK)
    except (OSError, ValueError):
        marked = None
    if output.is_dir() and any(output.iterdir()) and marked != MARKED:
        raise InputError(f"{str(output)!r} holds something else: give a new or an empty folder")
    found = sorted(path for path in videos.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise InputError(f"{str(videos)!r} holds no video: files that end in {', '.join(SUFFIXES)}")
    make_folder(output)
    return found


def _own(name: str) -> str:
    """A video's name in the output folder: what can be read of it, and a hash that tells it from others."""
    word = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem).strip("-")[:40]
    return f"{word or 'video'}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"


@contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Raises InputError while another process makes pairs in the same folder."""
    held = os.open(output / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        if lock(held) is False:
            raise InputError(f"another process is writing {str(output)!r}: wait until it has ended")
        yield
    finally:
        os.close(held)
