"""What training asks about looks: which kinds they are, how their textures run, and how they look upright."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..world.paint_many import Cast, draw_upright
from ..world.scene_arrays import LOOKS, look_numbers
from ..world.scenes import NOUNS, PERIODS, TEXTURES, Actor

PORTRAIT = 32
"""Side of the upright sprite that a training-only head redraws from the visual queries: as large as in a
video, since what is smaller keeps no pattern."""
RUNS = 7
"""How a texture runs: cosine and sine of its angle, of twice and of four times its angle, and its period."""
TURNS = ((0, 1, ("stripes",)), (2, 2, ("stripes", "checks")), (4, 4, ("dots",)))
"""Column of a cosine and a sine among these, how many times the angle they are of, and of which textures."""
AT_ONCE = {"cpu": 256, "cuda": 2048}
"""Clips that are drawn together, some 6 MB each on the way: on a GPU few calls count."""


def cast_of(actors: Sequence[Actor]) -> Cast:
    """What ``paint_many`` takes: the nouns and looks of actors."""
    looks = [look_numbers(actor.identity) for actor in actors]
    found = {name: torch.tensor(np.array([look[name] for look in looks])) for name in LOOKS}
    cast = {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
    return cast | {"noun": torch.tensor([NOUNS.index(actor.noun) for actor in actors])}


def told_of(cast: Cast) -> dict[str, Tensor]:
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
