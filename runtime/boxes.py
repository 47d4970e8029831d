"""Where in the picture a request's concepts may be: boxes, checked, and drawn over the video's tokens.

A box is x0, y0, x1, y1, fractions of the picture's width and height from its top left corner. It is a key of
one video frame: between two keys of a concept its box moves linearly, before the first and behind the last
it stands still. A token sees a concept where the box covers any part of its patch in any of its frames; what
has no box is seen everywhere.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, wrong_in
from .cleaning import clean

if TYPE_CHECKING:
    from .bundle_format.schema import Manifest
    from .request import Request

Box = tuple[float, float, float, float]
Keys = dict[int, Box]
"""A concept's boxes by video frame, in their order."""

SLACK = 1e-6  # of a patch: 0.29 of 100 patches ends where the 29th does, whatever floats make of it
WRITTEN = "x0,y0,x1,y1 in fractions of the picture, like 0.1,0.2,0.5,0.8"
LISTED = "a list of four numbers, x0, y0, x1, y1 in fractions of the picture, like [0.1, 0.2, 0.5, 0.8]"
BY_LABEL = 'an object, {"cat": [0.1, 0.2, 0.5, 0.8]}'
LATEST = 10**9
"""Beyond the last frame of any video."""


def read(texts: Iterable[tuple[str, str]]) -> dict[str, Keys]:
    """Boxes that are written x0,y0,x1,y1 or x0,y0,x1,y1@frame, with their labels. Raises InputError."""
    found: dict[str, Keys] = {}
    for label, text in texts:
        numbers_of, at, frame = text.partition("@")
        try:
            x0, y0, x1, y1 = (float(number) for number in numbers_of.split(","))
        except ValueError:
            raise InputError(f"the box of {label!r} is written {WRITTEN}, not {text!r:.60}") from None
        _add(found.setdefault(label, {}), label, _frame(label, frame.strip()) if at else 0, (x0, y0, x1, y1))
    return found


@wrong_in("boxes")
def checked(boxes: Any, labels: Sequence[str]) -> dict[str, Keys]:
    """A request's boxes by the labels of its concepts.

    boxes: of each label one box, for the whole video, or boxes by frame, whose numbers may be text as in
    JSON. Raises InputError for the first that is wrong.
    """
    if not isinstance(boxes, Mapping):
        raise InputError(f"boxes must be {BY_LABEL}, or have boxes by frame, not {boxes!r:.60}")
    known = {clean(label).casefold(): label for label in labels}
    found: dict[str, Keys] = {}
    for name, value in boxes.items():
        label = known.get(clean(name).casefold()) if isinstance(name, str) else None
        if label is None:
            there = f"the labels are {', '.join(map(repr, labels))}" if labels else "there are no concepts"
            raise InputError(f"a box for {name!r:.60}, but no concept is labelled so: {there}")
        keys = found.setdefault(label, {})
        if not isinstance(value, Mapping):
            _add(keys, label, 0, value)
            continue
        if not value:
            raise InputError(f"the boxes of {label!r} are none: leave them out")
        for frame, box in value.items():
            _add(keys, label, _frame(label, frame), box)
    return {label: dict(sorted(keys.items())) for label, keys in found.items()}


@wrong_in("boxes")
def fit(boxes: Mapping[str, Keys], manifest: Manifest) -> None:
    """Raises InputError for boxes that the bundle cannot follow."""
    if boxes and not manifest.takes_boxes:
        raise InputError(
            f"the bundle {manifest.name!r} cannot place concepts: leave the boxes out, or export its weights "
            "with `export --boxes`"
        )
    last = manifest.shapes.frames - 1
    for label, keys in boxes.items():
        if max(keys) > last:
            raise InputError(
                f"a box of {label!r} at frame {max(keys)}: the videos of {manifest.name!r} have the frames 0 "
                f"to {last}"
            )


def drawn(request: Request, manifest: Manifest) -> np.ndarray:
    """Which video token may see which concept, bool [S,N] in the transformer's order; all may see a concept
    without a box, and places without a concept."""
    shapes, grid = manifest.shapes, manifest.grid
    firsts = range(0, shapes.latent[1], shapes.latent[1] // grid[0])  # latent frames
    starts = [max(0, 1 + (first - 1) * shapes.frames_per_latent) for first in firsts]
    mask = np.ones((*grid, shapes.concepts), bool)  # [f,h,w,N]
    for number, concept in enumerate(request.concepts):
        if (keys := request.boxes.get(concept.label)) is not None:
            mask[..., number] = tokens(along(keys, shapes.frames), grid, starts)
    return mask.reshape(-1, shapes.concepts)


def means(request: Request, manifest: Manifest) -> np.ndarray:
    """Each concept's mean box over the video, float32 [N,4]; the whole picture without one."""
    found = np.tile(np.array([0, 0, 1, 1], np.float32), (manifest.shapes.concepts, 1))
    for number, concept in enumerate(request.concepts):
        if (keys := request.boxes.get(concept.label)) is not None:
            found[number] = along(keys, manifest.shapes.frames).mean(0)
    return found


def along(keys: Mapping[int, Box], frames: int) -> np.ndarray:
    """A concept's box in each of a video's frames, float64 [frames,4]."""
    at = sorted(keys)
    sides = np.array([keys[frame] for frame in at]).T  # [4,keys]
    return np.stack([np.interp(np.arange(frames), at, side) for side in sides], axis=1)


def tokens(boxes: np.ndarray, grid: tuple[int, int, int], starts: Sequence[int]) -> np.ndarray:
    """Boxes by video frame [...,frames,4] → the tokens that they touch, bool [...,f,h,w].

    grid: f, h, w, patches of the whole video; starts: the first video frame of each of its f.
    """
    _, height, width = grid
    rows = _patches(boxes[..., 1], boxes[..., 3], height)  # [...,frames,h]
    columns = _patches(boxes[..., 0], boxes[..., 2], width)  # [...,frames,w]
    touched = rows[..., :, None] & columns[..., None, :]  # [...,frames,h,w]
    return np.logical_or.reduceat(touched, np.asarray(starts), axis=-3)


def _patches(first: np.ndarray, last: np.ndarray, count: int) -> np.ndarray:
    """The patches of a side that first..last touches, one at least: [...] → bool [...,count]."""
    begin = np.minimum(np.floor(first * count + SLACK), count - 1)[..., None]
    end = np.maximum(np.ceil(last * count - SLACK)[..., None], begin + 1)
    patch = np.arange(count)
    return (patch >= begin) & (patch < end)


def _frame(label: str, frame: Any) -> int:
    if isinstance(frame, str) and re.fullmatch(r"[0-9]{1,60}", frame, re.ASCII):
        frame = int(frame)
    if isinstance(frame, bool) or not isinstance(frame, numbers.Integral) or frame < 0:
        raise InputError(f"a box of {label!r}: a frame is a number from 0 on, not {frame!r:.60}")
    if int(frame) >= LATEST:
        raise InputError(f"a box of {label!r}: no video has so late a frame, {frame!s:.60}")
    return int(frame)


def _add(keys: Keys, label: str, frame: int, box: Any) -> None:
    """Notes a box of a frame. Raises InputError."""
    if isinstance(box, np.ndarray):
        box = box.tolist()
    listed = isinstance(box, Sequence) and not isinstance(box, (str, bytes)) and len(box) == 4
    if not listed or not all(isinstance(n, numbers.Real) and not isinstance(n, bool) for n in box):
        raise InputError(f"the box of {label!r} must be {LISTED}, not {box!r:.80}")
    told = ",".join(f"{number!s:.12}" for number in box)
    if not all(0 <= number <= 1 for number in box):  # so NaN is refused as well
        raise InputError(
            f"the box of {label!r}, {told}, is not inside the picture: its numbers are fractions, 0 to 1"
        )
    x0, y0, x1, y1 = (float(number) for number in box)
    if x1 <= x0 or y1 <= y0:
        raise InputError(
            f"the box of {label!r}, {told}, is empty: x0 must be less than x1, and y0 less than y1"
        )
    if frame in keys:
        raise InputError(f"two boxes of {label!r} for frame {frame}: give one")
    keys[frame] = (x0, y0, x1, y1)
