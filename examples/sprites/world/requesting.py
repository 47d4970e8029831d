"""A scene as a request: its reference pictures, its ``request.json``, and the true video to compare with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from conceptmaster.atomic_write import replacing
from conceptmaster.errors import InputError
from conceptmaster.runtime.request import Concept
from conceptmaster.runtime.sheet import save_png
from conceptmaster.runtime.video import Video

from .draw import draw_clip, draw_reference
from .scenes import FPS, Scene

PICTURE = 128
"""Side of a reference picture in pixels."""


def references(scene: Scene) -> list[np.ndarray]:
    """One picture per actor, uint8 [128, 128, 3], each in a pose of its own; the same for the same scene."""
    rng = np.random.Generator(np.random.Philox(key=[scene.seed, 13]))
    return [draw_reference(actor, rng, PICTURE) for actor in scene.actors]


def concepts(scene: Scene, pictures: Sequence[np.ndarray]) -> tuple[Concept, ...]:
    """The scene's labels, each with a picture, in order."""
    return tuple(Concept(actor.label, picture) for actor, picture in zip(scene.actors, pictures, strict=True))


def make_folder(folder: Path) -> None:
    """Make the folder where it is missing. Raises InputError where that fails, or it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"the folder {str(folder)!r} is not writable")


def write_request(scene: Scene, folder: Path, *, truth: bool = True) -> Path:
    """Write ``1.png``, ``2.png`` … , ``truth.mp4`` if ``truth``, and at last ``request.json``.

    The folder is made where it is missing; files of these names are replaced, each whole or not at all.
    Returns the path of ``request.json``. Raises InputError for a folder that cannot be made or written to,
    OSError when writing fails.
    """
    make_folder(folder)
    names = [f"{number}.png" for number in range(1, len(scene.actors) + 1)]
    for name, picture in zip(names, references(scene), strict=True):
        with replacing(folder / name) as temporary:
            save_png(Image.fromarray(picture), temporary)
    if truth:
        Video(draw_clip(scene)[0], FPS, scene.seed, scene.caption).save(folder / "truth.mp4")
    request = {
        "prompt": scene.caption,
        "concepts": [{"label": a.label, "image": n} for a, n in zip(scene.actors, names, strict=True)],
        "seed": scene.seed,
    }
    path = folder / "request.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")
    return path
