"""Trains the scorer on looks that are not held out: minutes of one core.

A pool of frames is drawn once. In each step crops of concepts are told from those of other looks by their
reference pictures, among all and among their own noun alone (InfoNCE, van den Oord et al., 2018); crops and
pictures are named; frames are told from each other by their captions. What it sees is blurred, noisy and
cut at random, since what it will judge is not as sharp as what is drawn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conceptmaster.engine.checkpoints.safetensors_io import save

from ..training.batches import generator
from ..training.clip_arrays import in_parts, looks_of
from ..training.learning import MuonAdamW
from ..training.loop import LoopOptions, log_to, random_of, train
from ..world.draw import look_of, paint_background
from ..world.paint_many import draw_references, filled, in_frames, to_bytes, windows_along
from ..world.scene_arrays import arrays_of
from ..world.scenes import FRAMES, MOTIONS, NOUNS, ORDINALS, SIZE, random_scene
from .scorer import Scorer, numbers_of, shrunk

POOL = 3072
"""Scenes in the pool, one frame each."""
FIRST = 50_000_000
"""Seed of the pool's first scene."""
SCENES = 32
"""In a step."""
NOISE, BLURS = 0.04, 2
"""Greatest standard deviation of noise, in 0..1; how often a picture is blurred, by up to a pixel each
time."""
CUT = 0.12
"""How far a box is moved at most, in parts of its side."""


def draw_pool(count: int = POOL, first: int = FIRST, held_out: bool = False) -> dict[str, Tensor]:
    """Frames uint8 [n,3,SIZE,SIZE] and captions' words [n,LONGEST]; of their M concepts: crops and pictures
    uint8 [M,3,SIDE,SIDE], the frame that each is of [M], and its noun [M]."""
    rng = np.random.default_rng(first)
    parts = [
        _block(range(k, min(k + 256, first + count)), rng, held_out) for k in range(first, first + count, 256)
    ]
    offsets = np.cumsum([0, *(len(part["frames"]) for part in parts[:-1])])
    for part, offset in zip(parts, offsets, strict=True):
        part["frame"] += int(offset)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _block(seeds: range, rng: np.random.Generator, held_out: bool) -> dict[str, Tensor]:
    scenes = [random_scene(seed, held_out=held_out) for seed in seeds]
    arrays = arrays_of(scenes)
    tensors = {n: torch.from_numpy(value) for n, value in arrays.items() if value.dtype != object}
    when = torch.from_numpy(rng.integers(FRAMES, size=len(scenes)))
    ground = torch.from_numpy(np.stack([paint_background(s.background, rng) for s in scenes])).float()
    rows, columns = filled(tensors["count"], tensors["radius"].shape[1])
    cast = {name: value[rows, columns] for name, value in looks_of(tensors, "").items()}
    turned = torch.tensor([look_of(name) for name in MOTIONS])[tensors["motion"][rows, columns]]
    path = tensors["path"][rows, columns, when[rows]][:, None]  # [M,1,2]
    windows, corner = windows_along(cast, tensors["radius"][rows, columns], path, turned)
    sprites = in_frames(windows, corner)[:, 0]  # [M,S,S,4]
    for n in range(tensors["radius"].shape[1]):  # each over those before it
        some = sprites[columns == n]
        at = rows[columns == n]
        ground[at] = ground[at] * (1 - some[..., 3:]) + some[..., :3]
    frames = to_bytes(ground).permute(0, 3, 1, 2).contiguous()
    boxes = [
        scenes[r].actors[c].boxes()[when[r]] for r, c in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    crops = torch.cat([_crop(frames[r], b, rng) for r, b in zip(rows.tolist(), boxes, strict=True)])
    pictures = in_parts(draw_references, cast, generator(rng, "cpu")).permute(0, 3, 1, 2)
    return {
        "frames": frames,
        "words": numbers_of(list(arrays["caption"])),
        "crops": crops,
        "pictures": _bytes(shrunk(pictures.float() / 255)),
        "frame": rows,
        "noun": cast["noun"],
    }


def _crop(frame: Tensor, box: np.ndarray, rng: np.random.Generator) -> Tensor:
    """A frame's box, moved a little, uint8 [1,3,SIDE,SIDE]."""
    side = np.tile(box[2:] - box[:2], 2)
    x0, y0, x1, y1 = ((box + rng.uniform(-CUT, CUT, 4) * side).clip(0, 1) * SIZE).round().astype(int)
    return _bytes(shrunk(frame[None, :, y0 : max(y1, y0 + 2), x0 : max(x1, x0 + 2)].float() / 255))


def _bytes(pictures: Tensor) -> Tensor:
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def worn(pictures: Tensor, g: torch.Generator) -> Tensor:
    """Pictures uint8 [n,3,SIDE,SIDE] as a model might make them: blurred, noisy, of other light; 0..1."""
    x = pictures.float() / 255
    count = len(x)

    def uniform(high: float) -> Tensor:
        return high * torch.rand(count, 1, 1, 1, generator=g)

    for axis in (2, 3) * BLURS:  # each blends a picture with itself, a pixel to either side
        beside = (x.roll(1, axis) + x.roll(-1, axis)) / 2
        x = x.lerp(beside, uniform(0.6))
    x = x + uniform(NOISE) * torch.randn(x.shape, generator=g)
    return ((x - 0.5) * (0.9 + uniform(0.2)) + 0.5 + uniform(0.1) - 0.05).clamp(0, 1)


def _nce(a: Tensor, b: Tensor, scale: Tensor, among: Tensor | None = None) -> Tensor:
    logits = a @ b.T * scale.exp()
    if among is not None:
        logits = logits.masked_fill(~among, -1e4)
    own = torch.arange(len(a))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def losses(scorer: Scorer, pool: dict[str, Tensor], scenes: Tensor, g: torch.Generator) -> dict[str, Tensor]:
    """Of some of the pool's scenes: ``total``, ``look`` (the right one found, among all and its noun's),
    ``label``, ``caption``; and ``found``: how often the right picture is the nearest among its noun's."""
    some = torch.nonzero(torch.isin(pool["frame"], scenes))[:, 0]
    crops, pictures = worn(pool["crops"][some], g), worn(pool["pictures"][some], g)
    frames = worn(_bytes(shrunk(pool["frames"][scenes].float() / 255)), g)
    looks, names = scorer(torch.cat((crops, pictures, frames)))
    count, noun = len(some), pool["noun"][some]
    same = noun[:, None] == noun
    crop, picture = looks[:count], looks[count : 2 * count]
    look = _nce(crop, picture, scorer.scales[0]) + _nce(crop, picture, scorer.scales[0], same)
    ranked = ORDINALS[int(torch.randint(3, (1,), generator=g))]
    labels = scorer.read(numbers_of([*NOUNS, *(f"{ranked} {noun}" for noun in NOUNS)]))
    label = torch.stack(
        [
            F.cross_entropy(names[: 2 * count] @ some_of.T * scorer.scales[1].exp(), noun.repeat(2))
            for some_of in labels.chunk(2)
        ]
    ).mean()
    label = label + 0.3 * _nce(names[:count], names[count : 2 * count], scorer.scales[1])
    caption = _nce(names[2 * count :], scorer.read(pool["words"][scenes]), scorer.scales[2])
    with torch.no_grad():
        nearest = (crop @ picture.T).masked_fill(~same, -2).argmax(1)
        found = (nearest == torch.arange(count)).float().mean()
    return {"total": look + label + caption, "look": look, "label": label, "caption": caption, "found": found}


def train_scorer(output: Path, steps: int) -> None:
    """Train to ``steps`` and write ``scorer.safetensors``; an interrupted training goes on from
    ``training.safetensors`` in ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    scorer, pool = Scorer(), draw_pool()
    check = draw_pool(256, FIRST - 256, held_out=True)
    optimizer = MuonAdamW(scorer.named_parameters(), 0.01, 0.002, adam_names=("words", "places", "scales"))

    def step_losses(step: int) -> dict[str, Tensor]:
        rng = random_of(31, step)
        chosen = torch.from_numpy(np.sort(rng.choice(POOL, SCENES, replace=False)))
        return losses(scorer, pool, chosen, generator(rng, "cpu"))

    @torch.no_grad()
    def publish(_: int) -> dict[str, float]:
        save(output / "scorer.safetensors", scorer.state_dict())
        found = losses(scorer, check, torch.arange(256), torch.Generator().manual_seed(0))
        return {f"held_out_{name}": round(float(value), 4) for name, value in found.items()}

    train(
        scorer,
        optimizer,
        step_losses,
        LoopOptions("scorer", steps, log_every=50, save_every=200),
        log=log_to(output / "log.jsonl"),
        checkpoint=output / "training.safetensors",
        publish=publish,
    )
