"""Clips as arrays, drawn from arrays of scenes, with all that training asks of them: their pictures, where
the concepts are, which kinds these are, how their textures run, and how they look upright."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..world.draw import paint_background
from ..world.paint_many import Cast, draw_clips, draw_references, draw_upright, filled
from ..world.scene_arrays import LOOKS, look_numbers, scene_arrays
from ..world.scenes import BACKGROUNDS, MAX_CONCEPTS, NOUNS, PERIODS, TEXTURES, Actor

REFERENCES = 2
"""Reference pictures drawn for each concept; training picks one of them at random."""
LATENT_GRID = (5, 8, 8)
CLIPS = {"latents": "", "decoys": "decoy_"}
"""The two clips of a scene, its own and its decoy's: what the latents of each are called, and what its looks
begin with."""
TEXTS = ("count", "token_ids", "token_mask", "loose_ids", "loose_mask", "label_ids", "label_mask")
"""What is taken over from scenes as it is."""
PORTRAIT = 32
"""Side of the upright sprite that a training-only head redraws from the visual queries: as large as in a
video, since what is smaller keeps no pattern."""
RUNS = 7
"""How a texture runs: cosine and sine of its angle, of twice and of four times its angle, and its period."""
TURNS = ((0, 1, ("stripes",)), (2, 2, ("stripes", "checks")), (4, 4, ("dots",)))
"""Column of a cosine and a sine among these, how many times the angle they are of, and of which textures."""
AT_ONCE = {"cpu": 16, "cuda": 2048}
"""Clips that are drawn together, some 6 MB each on the way: on a GPU few calls count, on a CPU its cache."""


def cast_of(actors: Sequence[Actor]) -> Cast:
    """What ``paint_many`` takes: the nouns and looks of actors."""
    looks = [look_numbers(actor.identity) for actor in actors]
    found = {name: torch.tensor(np.array([look[name] for look in looks])) for name in LOOKS}
    cast = {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
    return cast | {"noun": torch.tensor([NOUNS.index(actor.noun) for actor in actors])}


def targets_of(cast: Cast) -> dict[str, Tensor]:
    """What heads are asked to tell of P concepts: ``portraits``, upright and alone on grey, uint8
    [P,32,32,3]; ``traits``, uint8 [P,3]: texture, accessory, noun; ``patterns`` (see ``patterns``)."""
    traits = torch.stack([cast[name] for name in ("texture", "accessory", "noun")], 1).byte()
    return {
        "portraits": in_parts(draw_upright, cast, PORTRAIT),
        "traits": traits,
        "patterns": patterns(cast),
    }


def patterns(cast: Cast) -> Tensor:
    """What tells textures from others of their kind, float32 [P,RUNS]; NaN where a kind has no such thing.

    Checks look the same after half a turn, dots after a quarter: twice and four times the angle do not jump
    there. Stripes change places after half a turn; twice the angle says how they lie. The period is scaled to
    -1..1.
    """
    kind = cast["texture"]
    runs = cast["angle"].new_full((len(kind), RUNS), torch.nan)
    for column, times, names in TURNS:
        some = torch.isin(kind, torch.tensor([TEXTURES.index(name) for name in names], device=kind.device))
        turned = times * cast["angle"]
        runs[:, column] = torch.where(some, turned.cos(), runs[:, column])
        runs[:, column + 1] = torch.where(some, turned.sin(), runs[:, column + 1])
    period = (cast["period"] - float(np.mean(PERIODS))) / float(np.ptp(PERIODS) / 2)
    runs[:, 6] = torch.where(kind == TEXTURES.index("plain"), torch.nan, period)
    return runs


def at_once(device: str | torch.device) -> int:
    """Clips that are drawn together on a device."""
    return AT_ONCE.get(torch.device(device).type, AT_ONCE["cpu"])


def in_parts(draw: Callable[..., Tensor], cast: Cast, *how: object) -> Tensor:
    """``draw(cast, *how)``, so many sprites at a time that their pixels fit."""
    size = 8 * at_once(cast["noun"].device)
    starts = range(0, len(cast["noun"]), size)
    return torch.cat([draw({n: v[k : k + size] for n, v in cast.items()}, *how) for k in starts])


def looks_of(scenes: dict[str, Tensor], prefix: str) -> Cast:
    """What is painted in scenes, [B,N,…] each; ``prefix``: "", or "decoy_" for their decoys."""
    return {"noun": scenes["noun"]} | {name: scenes[prefix + name] for name in LOOKS}


def coverage(visible: Tensor) -> Tensor:
    """How much of every latent cell a concept covers: float [B,N,F,S,S] -> uint8 [B,N,5,8,8]."""
    later, rows, columns = LATENT_GRID[0] - 1, *LATENT_GRID[1:]
    cells = visible.unflatten(4, (columns, -1)).unflatten(3, (rows, -1)).mean((4, 6))  # [B,N,F,8,8]
    rest = cells[:, :, 1:].unflatten(2, (later, -1)).mean(3)
    return (torch.cat((cells[:, :, :1], rest), dim=2) * 255).round().to(torch.uint8)


def draw_block(
    scenes: dict[str, Tensor],
    ground: Tensor,
    g: torch.Generator,
    encode: Callable[[Tensor], Tensor],
    videos: bool = False,
) -> dict[str, Tensor]:
    """Tokenised scenes (see ``scene_arrays``) on a device, as ``Pool`` has its clips.

    ground [B,S,S,3]: the backgrounds, 0..1; g: chooses poses; encode: clips, uint8 [b,F,S,S,3], to latents;
    videos: the clips themselves are among what is returned, as ``video``.
    """
    parts, some = [], at_once(ground.device)
    for k in range(0, len(ground), some):
        part = {name: value[k : k + some] for name, value in scenes.items()}
        drawn = {
            name: draw_clips(looks_of(part, prefix), part, ground[k : k + some])
            for name, prefix in CLIPS.items()
        }
        found = {name: encode(clips) for name, (clips, _) in drawn.items()}
        found |= {"video": drawn["latents"][0]} if videos else {}
        parts.append(found | {"coverage": coverage(drawn["latents"][1])})
    clips = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return clips | _pictures(scenes, g) | {name: scenes[name] for name in TEXTS}


def draw_videos(count: int, device: str, held_out: bool = False) -> Tensor:
    """The clips of the first ``count`` seeds alone, each on its own background, uint8 [count,F,S,S,3]; of
    looks that are held out, or of the others."""
    arrays, kinds = scene_arrays(0, count, held_out), list(BACKGROUNDS)
    scenes = {n: torch.from_numpy(value).to(device) for n, value in arrays.items() if value.dtype != object}
    rngs = [np.random.Generator(np.random.Philox(key=[seed, 7])) for seed in range(count)]
    ground = [paint_background(kinds[k], rng) for k, rng in zip(arrays["background"], rngs, strict=True)]
    parts, some = [], at_once(device)
    for k in tqdm(range(0, count, some), "draw", unit="block", leave=False):
        part = {name: value[k : k + some] for name, value in scenes.items()}
        under = torch.from_numpy(np.stack(ground[k : k + some])).to(device)
        parts.append(draw_clips(looks_of(part, ""), part, under)[0])
    return torch.cat(parts)


def _pictures(scenes: dict[str, Tensor], g: torch.Generator) -> dict[str, Tensor]:
    """References, foreign ones, and what is told of the concepts, [B,N,…] each."""
    rows, columns = filled(scenes["count"], MAX_CONCEPTS)
    cast = {name: value[rows, columns] for name, value in looks_of(scenes, "").items()}
    strangers = cast | {"noun": scenes["foreign_noun"][rows, columns]}
    drawn = {
        "references": torch.stack([in_parts(draw_references, cast, g) for _ in range(REFERENCES)], 1),
        "foreign": in_parts(draw_references, strangers, g),
        **targets_of(cast),
    }
    found = {}
    for name, value in drawn.items():
        empty = {"portraits": 128, "patterns": torch.nan}.get(name, 0)
        shape = (len(scenes["count"]), MAX_CONCEPTS, *value.shape[1:])
        found[name] = value.new_full(shape, empty)
        found[name][rows, columns] = value
    return found
