"""Videos whose truth is known: scenes of the sprites world, large enough for the paper's area rule.

Of every video the folder has NAME.mp4 and its caption, NAME.txt; truth.jsonl has for each where every concept
is, frame by frame. Spoiled videos are such that the pipeline must drop them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster.atomic_write import replacing
from conceptmaster.examples.sprites.world.draw import look_of, paint_along, paint_background
from conceptmaster.examples.sprites.world.requesting import make_folder
from conceptmaster.examples.sprites.world.scenes import (
    MOTIONS,
    PLACES,
    SIZE,
    Actor,
    Scene,
    random_scene,
    tell,
)
from conceptmaster.runtime.progress import each
from conceptmaster.runtime.video import Video

from .rectangles import box_of

SIDE = 256
"""Of a frame, in pixels."""
FRAMES, FPS = 33, 16.0
TRUTH = "truth.jsonl"
SPOILED = ("cut", "still", "dark", "no_caption", "no_video")
"""Two scenes in one; nothing moves; all of it dark; without its caption; a file that is no video."""
RADII = {1: (12.5, 18.0), 2: (11.5, 13.5)}
"""Of one concept's sprites and of two's, in the world's pixels, of which a frame has ``SIZE``."""


@dataclass(frozen=True)
class Drawn:
    """A video uint8 [F,H,W,3], its caption, and for every concept its noun and where it shows: x0, y0, x1, y1
    in shares of the frame, [F,4]."""

    frames: np.ndarray
    caption: str
    nouns: tuple[str, ...]
    boxes: np.ndarray


def scene_of(seed: int) -> Scene:
    """One or two concepts of different nouns, which stay apart and inside."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 200]))
    scene = random_scene(seed, held_out=False, concepts=1 + seed % 2, same_noun=False)
    low, high = RADII[len(scene.actors)]
    while True:
        actors = []
        for actor in scene.actors:
            radius, cell = float(rng.uniform(low, high)), list(PLACES)[rng.integers(len(PLACES))]
            x, y = (SIZE / 2 + (at - 1) * 18 + float(rng.uniform(-1.5, 1.5)) for at in cell)
            motion = MOTIONS[rng.integers(len(MOTIONS))]
            actors.append(replace(actor, radius=radius, cell=cell, start=(x, y), motion=motion))
        if all(_inside(actor) for actor in actors) and _apart(actors) and _moves(actors):
            caption = tell(rng, actors, scene.background, plainly=True)
            return replace(scene, actors=tuple(actors), caption=caption)


def _inside(actor: Actor) -> bool:
    boxes = actor.boxes()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return bool((area > 0.9 * (2 * actor.radius / SIZE) ** 2).all())  # nearly all of it


def _apart(actors: list[Actor]) -> bool:
    """Whether no two bodies ever touch."""
    if len(actors) == 1:
        return True
    apart = np.hypot(*(actors[0].path() - actors[1].path()).T).min()
    return bool(apart > 1.25 * sum(actor.radius for actor in actors))


def _moves(actors: list[Actor]) -> bool:
    return any(actor.motion != "still" for actor in actors)


def draw(scene: Scene, frames: int = FRAMES, side: int = SIDE) -> Drawn:
    """A scene's video, and where its concepts show, at `side` pixels."""
    rng = np.random.Generator(np.random.Philox(key=[scene.seed, 7]))
    scale = side / SIZE
    canvas = np.repeat(paint_background(scene.background, rng, side)[None], frames, 0).astype(np.float32)
    seen: list[np.ndarray] = []
    for actor in scene.actors:
        path = actor.path(frames) * scale
        look = look_of(actor.motion)
        rgb, alpha = paint_along(actor.noun, actor.identity, actor.radius * scale, path, look, side)
        canvas = canvas * (1 - alpha[..., None]) + rgb
        seen = [mask * (1 - alpha) for mask in seen] + [alpha]
    pixels = np.round(canvas.clip(0, 1) * 255).astype(np.uint8)
    boxes = np.stack([[box_of(mask > 0.5) for mask in masks] for masks in seen])
    return Drawn(pixels, scene.caption, tuple(actor.noun for actor in scene.actors), boxes)


def write(folder: Path, videos: int, spoiled: int = 0, seed: int = 0, show: bool = False) -> None:
    """Writes so many good videos, and so many spoiled ones of all kinds in turn, into a folder.

    Raises: InputError for a folder that cannot be made or written to, OSError.
    """
    make_folder(folder)
    truth = []
    for number in each(range(videos + spoiled), "videos", show):
        how = SPOILED[(number - videos) % len(SPOILED)] if number >= videos else ""
        drawn = draw(scene_of(seed + number))
        name = f"{number:04}{how and '-'}{how}"
        _write_one(folder, name, _spoil(drawn, how, seed + number), how)
        if not how:
            concepts = [
                {"label": noun, "boxes": np.round(boxes, 5).tolist()}
                for noun, boxes in zip(drawn.nouns, drawn.boxes, strict=True)
            ]
            truth.append({"video": f"{name}.mp4", "caption": drawn.caption, "concepts": concepts})
    with replacing(folder / TRUTH) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in truth), encoding="utf-8")


def _spoil(drawn: Drawn, how: str, seed: int) -> Drawn:
    frames: Any = drawn.frames
    if how == "cut":
        frames = np.concatenate([frames[:16], 255 - draw(scene_of(seed + 10**6)).frames[16:]])
    elif how == "still":
        frames = np.repeat(frames[:1], len(frames), 0)
    elif how == "dark":
        frames = frames // 16
    return replace(drawn, frames=frames)


def _write_one(folder: Path, name: str, drawn: Drawn, how: str) -> None:
    if how != "no_caption":
        with replacing(folder / f"{name}.txt") as temporary:
            temporary.write_text(drawn.caption + "\n", encoding="utf-8")
    if how == "no_video":
        with replacing(folder / f"{name}.mp4") as temporary:
            temporary.write_bytes(b"\0\0\0\x18ftypisom" + bytes(500))
    else:
        Video(drawn.frames, FPS).save(folder / f"{name}.mp4")
