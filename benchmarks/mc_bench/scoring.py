"""Scores a folder of videos, sample by sample; what is known from an earlier run is not computed again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster.atomic_write import replacing
from conceptmaster.errors import InputError
from conceptmaster.hashed import sha256_file
from conceptmaster.runtime import pictures
from conceptmaster.runtime.bundle_format.strict_json import checksum
from conceptmaster.runtime.picture_colors import Color
from conceptmaster.runtime.progress import bar
from conceptmaster.untrusted import read_json

from . import videos
from .measures import Part, Values, Watched, evenly
from .samples import Sample

WHITE: Color = (255, 255, 255)
FORMAT = 1
"""Of what is kept; higher whenever the same video would get other numbers."""


@dataclass
class Scored:
    """A sample with its measures; skipped: why it has none."""

    sample: Sample
    video: Path | None = None
    values: Values = field(default_factory=dict)
    skipped: str | None = None


def score(
    samples: Sequence[Sample],
    folder: Path,
    kept: Path,
    parts: Sequence[Part],
    frames: int,
    progress: bool = False,
) -> list[Scored]:
    """All samples, in their order. A video that is missing or cannot be decoded is skipped, with the reason.

    folder: has NAME.mp4 of each sample (or another suffix of ``videos.SUFFIXES``); kept: folder of what is
    known, one file for each sample; frames: how many of a video the learned measures see, 0 for all.
    Raises: InputError where no sample has a video; what the parts raise.
    """
    if not folder.is_dir():
        raise InputError(f"no folder of videos at {str(folder)!r}")
    places = {sample.name: videos.find(folder, sample.name) for sample in samples}
    if not any(places.values()):
        raise InputError(
            f"{str(folder)!r} has no video of any sample: they are called NAME.mp4, as {samples[0].name}.mp4 "
            f"(or {', '.join(videos.SUFFIXES[1:])})"
        )
    kept.mkdir(parents=True, exist_ok=True)
    found = []
    with bar(len(samples), "score", progress) as advance:
        for sample in samples:
            found.append(_scored(sample, places[sample.name], kept / f"{sample.name}.json", parts, frames))
            advance()
    return found


def _scored(sample: Sample, video: Path | None, kept: Path, parts: Sequence[Part], frames: int) -> Scored:
    if video is None:
        return Scored(sample, skipped="there is no video")
    try:
        asked = _asked(sample, video, parts)
    except OSError as error:
        return Scored(sample, video, skipped=f"{str(error.filename)!r} cannot be read: {error.strerror}")
    except ValueError as error:  # a picture that is no file
        return Scored(sample, video, skipped=f"a picture {error}")
    known = _known(kept)
    watched: Watched | None = None
    values: Values = {}
    for part in parts:
        if known.get(part.name, {}).get("asked") != asked[part.name]:
            if watched is None:
                try:
                    watched = watch(sample, video, frames)
                except (InputError, ValueError) as error:  # nothing of a video that is no video is kept
                    return Scored(sample, video, skipped=str(error))
            known[part.name] = {"asked": asked[part.name], "values": part.measure(watched)}
            _keep(kept, known)
        values |= known[part.name]["values"]
    return Scored(sample, video, values)


def watch(sample: Sample, video: Path, frames: int) -> Watched:
    """A sample with its video and pictures read. Raises ValueError or InputError, one line."""
    clip = videos.read(video)
    shown = [
        np.asarray(pictures.read(path, WHITE, f"the picture of {label!r}"))
        for label, path in zip(sample.labels, sample.pictures, strict=True)
    ]
    return Watched(sample, clip, shown, evenly(len(clip.frames), frames))


def _asked(sample: Sample, video: Path, parts: Sequence[Part]) -> dict[str, str]:
    """By part a hash of all that its values follow from."""
    about: dict[str, Any] = {
        "format": FORMAT,
        "caption": sample.caption,
        "labels": list(sample.labels),
        "pictures": [sha256_file(path) for path in sample.pictures],
        "video": sha256_file(video),
    }
    return {part.name: checksum({**about, "part": part.name, "about": part.about}) for part in parts}


def _known(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        values = {name: entry for name, entry in found.items() if _sound(entry)}
    except (OSError, ValueError, AttributeError):  # none yet, or none of ours
        return {}
    return values


def _sound(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("values"), dict)
        and all(isinstance(value, float) for value in entry["values"].values())
    )


def _keep(path: Path, known: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
