"""What the pipeline makes: clips, each with its concepts' pictures, boxes and masks, and how they are read
again.

    pairs.jsonl      a line a clip: {"name", "video", "frames", "clip", "fps", "size", "caption", "concepts"}
    requests.jsonl   the same as requests, as `conceptmaster generate --requests` takes them
    clips/NAME/      clip.mp4; LABEL.png, the concept alone, with alpha; LABEL-FRAME.png, its mask, 0 or 255

Of a concept a line has {"label", "class", "kind", "image", "best", "boxes", "masks"}: boxes (x0, y0, x1, y1
in shares of the frame) and masks by frame of the clip; its picture is cut out of the frame "best". Paths are
relative to pairs.jsonl's folder."""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from conceptmaster.atomic_write import replacing
from conceptmaster.errors import InputError
from conceptmaster.runtime import media
from conceptmaster.runtime.atomic_folder import link
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.sheet import save_png
from conceptmaster.untrusted import open_plain, parse_json

from .films import Film
from .rectangles import Box, pixels

PAIRS, REQUESTS, CLIPS = "pairs.jsonl", "requests.jsonl", "clips"
ROOM = 0.03
"""Around a concept's box in its picture, in shares of the frame."""
SOFT = 1.0
"""How far the edge of a picture's alpha is softened, in pixels."""
LONGEST_LINE = 2**24


@dataclass(frozen=True)
class Pair:
    """A concept of a clip. image: its picture's path; boxes and masks (paths) by frame of the clip; best: the
    frame that the picture is of."""

    label: str
    name: str
    kind: str
    image: Path
    best: int
    boxes: dict[int, Box]
    masks: dict[int, Path]

    def mask(self, frame: int) -> np.ndarray:
        """The mask in a frame that has one, bool [H,W]. Raises OSError."""
        return np.asarray(Image.open(self.masks[frame])) > 127


@dataclass(frozen=True)
class Clip:
    """A clip with its pairs. video: the file that it is from, as it was named; frames: first and behind the
    last one there; path: the clip's own file."""

    name: str
    video: str
    frames: tuple[int, int]
    path: Path
    fps: float
    size: tuple[int, int]
    caption: str
    pairs: tuple[Pair, ...]

    def request(self) -> Request:
        """The clip's caption and concepts as a request."""
        data = {
            "prompt": self.caption,
            "concepts": [{"label": p.label, "image": str(p.image)} for p in self.pairs],
        }
        return Request.from_data(data, Path())


def read_pairs(folder: Path) -> Iterator[Clip]:
    """The clips of an output folder. Raises InputError, naming the line, for what is no such folder."""
    path, number = folder / PAIRS, 0
    try:
        with open_plain(path) as file:
            for line in iter(lambda: file.readline(LONGEST_LINE), b""):
                number += 1
                try:
                    yield _clip(parse_json(line), folder)
                except (KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"lacks or has wrong {error}") from None
    except OSError as error:
        raise InputError(f"cannot read the pairs {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"line {number} of {str(path)!r} {error}") from None


def _clip(line: Any, folder: Path) -> Clip:
    found = tuple(
        Pair(
            one["label"],
            one["class"],
            one["kind"],
            folder / one["image"],
            int(one["best"]),
            {int(number): tuple(box) for number, box in one["boxes"].items()},
            {int(number): folder / name for number, name in one["masks"].items()},
        )
        for one in line["concepts"]
    )
    frames, size = tuple(line["frames"]), tuple(line["size"])
    place = folder / line["clip"]
    return Clip(line["name"], line["video"], frames, place, float(line["fps"]), size, line["caption"], found)


def write_mask(mask: np.ndarray, folder: Path, shot: int, label: str, number: int) -> str:
    """Writes a mask bool [H,W] as a PNG; returns its name in the folder."""
    name = f"mask-{shot:03}-{_word(label)}-{number:06}.png"
    with replacing(folder / name) as temporary:
        save_png(Image.fromarray((mask * 255).astype(np.uint8)), temporary)
    return name


def write_clip(output: Path, video: str, film: Film, stages: Path, shot: dict[str, Any]) -> dict[str, Any]:
    """Writes a shot's clip and its concepts; returns its line of pairs.jsonl, without "video".

    stages: the folder that has its masks. Raises OSError, films.Unreadable.
    """
    name = f"{video}-{shot['shot']:03}"
    folder = output / CLIPS / name
    folder.mkdir(parents=True, exist_ok=True)
    start, stop = shot["frames"]
    with replacing(folder / "clip.mp4") as temporary:
        media.save((frame for _, frame in film.frames(start, stop)), film.fps, temporary, ".mp4", "420")
    frames = film.some([one["best"] for one in shot["concepts"]])
    concepts = []
    for one in shot["concepts"]:
        word, best = _word(one["label"]), str(one["best"])
        with Image.open(stages / one["masks"][best]) as opened:
            mask = np.asarray(opened) > 127
        with replacing(folder / f"{word}.png") as temporary:
            save_png(Image.fromarray(cut_out(frames[one["best"]], mask, one["boxes"][best])), temporary)
        masks = {}
        for number, mask_name in one["masks"].items():
            at = int(number) - start
            masks[str(at)] = f"{CLIPS}/{name}/{word}-{at:06}.png"
            with replacing(output / masks[str(at)]) as temporary:
                temporary.unlink()
                link(stages / mask_name, temporary)
        concepts.append(
            {
                **{key: one[key] for key in ("label", "class", "kind")},
                "image": f"{CLIPS}/{name}/{word}.png",
                "best": one["best"] - start,
                "boxes": {str(int(number) - start): box for number, box in one["boxes"].items()},
                "masks": masks,
            }
        )
    return {
        "name": name,
        "shot": shot["shot"],
        "frames": [start, stop],
        "clip": f"{CLIPS}/{name}/clip.mp4",
        "fps": film.fps,
        "size": [film.width, film.height],
        "caption": shot["caption"],
        "concepts": concepts,
    }


def cut_out(frame: np.ndarray, mask: np.ndarray, box: Box) -> np.ndarray:
    """A concept alone: what a box, and a little room, shows of a frame uint8 [H,W,3], with the mask bool
    [H,W] as alpha, its edge softened inwards; uint8 [h,w,4]. What is transparent has the colour of
    nothing."""
    inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3)), borderType=cv2.BORDER_REPLICATE)
    alpha = np.minimum(cv2.GaussianBlur(inside * 255.0, (0, 0), SOFT), mask * 255.0)
    room = (box[0] - ROOM, box[1] - ROOM, box[2] + ROOM, box[3] + ROOM)
    x0, y0, x1, y1 = pixels(tuple(min(1.0, max(0.0, side)) for side in room), frame.shape)  # type: ignore[arg-type]
    shown = np.where(alpha[..., None] > 0, frame, 255)
    whole = np.concatenate([shown, np.round(alpha)[..., None]], 2).astype(np.uint8)
    return np.ascontiguousarray(whole[y0:y1, x0:x1])


def files_of(output: Path, lines: Iterable[dict[str, Any]]) -> list[Path]:
    """All files that lines of pairs.jsonl name."""
    found = []
    for line in lines:
        named = [name for one in line["concepts"] for name in (one["image"], *one["masks"].values())]
        found += [output / name for name in (line["clip"], *named)]
    return found


def forget(output: Path, video: str) -> None:
    """Removes the clips of a video."""
    for folder in (output / CLIPS).glob(f"{glob.escape(video)}-[0-9]*"):
        shutil.rmtree(folder)


def write_lists(output: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes pairs.jsonl and requests.jsonl. Raises OSError."""
    lines = list(lines)
    requests = [
        {
            "name": line["name"],
            "prompt": line["caption"],
            "concepts": [{"label": one["label"], "image": one["image"]} for one in line["concepts"]],
        }
        for line in lines
    ]
    for name, values in ((REQUESTS, requests), (PAIRS, lines)):
        with replacing(output / name) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _word(label: str) -> str:
    """A label as a part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in label)
