"""Many scenes at once in PyTorch, drawn where a model is trained: the pixels of ``draw.py``, to rounding.

Sprites of one noun are painted together, by ``shapes.py``. Letters: P sprites, B clips, N concepts of a clip,
F frames, S side of a frame.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from .draw import REACH, look_of
from .scene_arrays import LOOKS
from .scenes import ACCESSORIES, FRAMES, MOTIONS, NOUNS, SIZE, TEXTURES, Identity
from .shapes import PAINTERS, Canvas, accessory, texture

Cast = dict[str, Tensor]
"""What sprites are, [P] or [P,3] each: ``noun`` and the fields of ``scene_arrays.LOOKS``."""


def paint_many(cast_: Cast, u: Tensor, v: Tensor, pixel: Tensor, look: Tensor) -> Tensor:
    """``shapes.paint_sprite`` of many sprites: u, v [P,…], pixel and look [P] -> [P,…,4], the colour
    premultiplied by the last, alpha."""
    out = u.new_zeros((*u.shape, 4))
    pixel, look = _broadcast(pixel, u.ndim), _broadcast(look, u.ndim)
    kinds = {name: cast_[name].cpu() for name in ("noun", "texture", "accessory")}
    for number, noun in enumerate(NOUNS):
        rows = torch.nonzero(kinds["noun"] == number)[:, 0]
        if len(rows) == 0:
            continue
        here = rows.to(u.device)
        canvas, turned = Canvas(u[here], v[here], pixel[here], look[here]), look[here]
        looks = {name: cast_[name][here] for name in LOOKS}
        paint = u.new_zeros((*canvas.u.shape, 3))
        for sort, _, some in _by_kind(kinds["texture"][rows], TEXTURES, u):
            identity = _identity(looks, some, u.ndim, texture=sort)
            paint[some] = texture(identity, canvas.u[some], canvas.v[some], canvas.pixel[some])
        everyone = torch.arange(len(rows), device=u.device)
        top = PAINTERS[noun](canvas, _identity(looks, everyone, u.ndim), paint)
        for sort, kind, some in _by_kind(kinds["accessory"][rows], ACCESSORIES, u):
            if kind == 0:
                continue
            worn = Canvas(canvas.u[some], canvas.v[some], canvas.pixel[some], turned[some])
            worn.rgb, worn.alpha = canvas.rgb[some], canvas.alpha[some]
            accessory(worn, _identity(looks, some, u.ndim, accessory=sort), top)
            canvas.rgb[some], canvas.alpha[some] = worn.rgb, worn.alpha
        out[here] = torch.cat((canvas.rgb, canvas.alpha[..., None]), dim=-1)
    return out


def _by_kind(kinds: Tensor, names: tuple[str, ...], like: Tensor) -> list[tuple[str, int, Tensor]]:
    """Every kind that occurs, its number, and the rows that are of it, where ``like`` is."""
    rows = [torch.nonzero(kinds == number)[:, 0] for number in range(len(names))]
    some = zip(names, range(len(names)), rows, strict=True)
    return [(name, number, of.to(like.device)) for name, number, of in some if len(of)]


def _broadcast(values: Tensor, dimensions: int) -> Tensor:
    return values.view(-1, *[1] * (dimensions - 1))


def _identity(looks: Cast, rows: Tensor, dimensions: int, **kinds: str) -> Identity:
    """What ``shapes.py`` asks of a look, of several, in a dimension of their own; kinds are one for all."""
    told: dict[str, Any] = dict(kinds)
    for name, numbers in LOOKS.items():
        if numbers:
            value = looks[name][rows]
            told[name] = value.view(-1, *[1] * (dimensions - 1), *value.shape[1:])
    return cast("Identity", SimpleNamespace(**told))


def _axis(side: int, like: Tensor) -> Tensor:
    return torch.arange(side, device=like.device, dtype=torch.float32) + 0.5


def windows_along(cast_: Cast, radius: Tensor, path: Tensor, look: Tensor) -> tuple[Tensor, Tensor]:
    """Sprites along their paths [P,F,2] in pixels, each in a window that follows it: [P,F,w,w,4], and the
    pixels of their upper left corners, int64 [P,F,2]."""
    half = int(math.ceil(REACH * float(radius.max()))) + 1
    corner = torch.floor(path) - half
    window = _axis(2 * half + 1, path)
    offset = (corner[:, :, None] + window[:, None] - path[:, :, None]) / radius[:, None, None, None]
    x, y = offset.unbind(-1)  # [P,F,w]
    shape = (*x.shape, x.shape[-1])
    u, v = x[:, :, None, :].expand(shape), y[:, :, :, None].expand(shape)
    return paint_many(cast_, u, v, 1.0 / radius, look), corner.long()


def in_frames(windows: Tensor, corner: Tensor, side: int = SIZE) -> Tensor:
    """Windows [P,F,w,w,4] in their place in frames, [P,F,S,S,4], zero elsewhere."""
    width = windows.shape[2]
    at = torch.arange(side, device=windows.device) - corner[..., None]  # [P,F,2,S]
    inside = (at >= 0) & (at < width)
    at = at.clamp(0, width - 1)
    index = (at[:, :, 1, :, None] * width + at[:, :, 0, None, :]).flatten(2)  # [P,F,S*S]
    placed = windows.flatten(2, 3).gather(2, index[..., None].expand(-1, -1, -1, 4))
    shown = inside[:, :, 1, :, None] & inside[:, :, 0, None, :]
    return placed.view(*index.shape[:2], side, side, 4) * shown[..., None]


def filled(count: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Row and slot of every concept, of clips that have ``count`` [B] of them: int64 [P] each."""
    there = torch.arange(slots, device=count.device) < count[:, None]
    rows, columns = torch.nonzero(there, as_tuple=True)
    return rows, columns


def draw_clips(casts: Cast, scenes: dict[str, Tensor], ground: Tensor) -> tuple[Tensor, Tensor]:
    """``draw.draw_clip`` of many scenes: the clips, uint8 [B,F,S,S,3], and what shows of every concept, float
    [B,N,F,S,S].

    casts [B,N] or [B,N,3] each; of scenes count [B], radius and motion [B,N], path [B,N,F,2]; ground (the
    backgrounds) [B,S,S,3].
    """
    count, radius, path, motion = (scenes[name] for name in ("count", "radius", "path", "motion"))
    rows, columns = filled(count, radius.shape[1])
    turned = torch.tensor([look_of(name) for name in MOTIONS])
    flat = {name: value[rows, columns] for name, value in casts.items()}
    look = turned.to(path.device)[motion[rows, columns]]
    windows, corner = windows_along(flat, radius[rows, columns], path[rows, columns], look)
    size = len(count), FRAMES, SIZE, SIZE
    canvas = ground[:, None].float().repeat(1, FRAMES, 1, 1, 1)
    visible = canvas.new_zeros((size[0], radius.shape[1], *size[1:]))
    for n in range(radius.shape[1]):  # each over those before it
        mine = columns == n
        clips = rows[mine]
        if len(clips) == 0:
            continue
        *colours, alpha = in_frames(windows[mine], corner[mine]).unbind(-1)
        keep = 1.0 - alpha
        visible[clips, :n] *= keep[:, None]
        visible[clips, n] = alpha
        canvas[clips] = canvas[clips] * keep[..., None] + torch.stack(colours, -1)
    return to_bytes(canvas), visible


def to_bytes(colours: Tensor) -> Tensor:
    """0..1 to uint8."""
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8)


def draw_references(casts: Cast, generator: torch.Generator) -> Tensor:
    """``draw.draw_reference`` of many sprites, each in another pose: casts of P -> uint8 [P,S,S,3]."""
    count, like = len(casts["noun"]), casts["body"]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand((count, *shape), generator=generator, device=like.device)
        return low + (high - low) * drawn

    radius, centre = SIZE * uniform(0.27, 0.35), SIZE / 2 + SIZE * uniform(-0.07, 0.07, 2)
    angle, stretch, lean = uniform(-0.5, 0.5), uniform(0.88, 1.14), uniform(-0.15, 0.15)
    ground = hsv(uniform(0, 1), uniform(0, 0.15), uniform(0.8, 1.0))
    axis = (_axis(SIZE, like) - centre[..., None]) / radius[:, None, None]  # [P,2,S]
    x, y = axis[:, 0, None, :], axis[:, 1, :, None]
    c, s, stretch, lean = (_broadcast(value, 3) for value in (angle.cos(), angle.sin(), stretch, lean))
    u, v = x * c + y * s, y * c - x * s
    u, v = (u + lean * v) * stretch, v / stretch
    painted = paint_many(casts, u, v, 1.0 / radius, uniform(-1, 1))
    return to_bytes(ground[:, None, None] * (1 - painted[..., 3:]) + painted[..., :3])


def draw_upright(casts: Cast, side: int) -> Tensor:
    """Sprites upright and alone on grey, as ``looks.py`` asks for them: uint8 [P,side,side,3]."""
    like, radius = casts["body"], 0.35 * side
    axis = (_axis(side, like) - side / 2) / radius
    shape = (len(like), side, side)
    u, v = axis[None, None, :].expand(shape), axis[None, :, None].expand(shape)
    still = like.new_zeros(len(like))
    painted = paint_many(casts, u, v, still + 1.0 / radius, still)
    return to_bytes(0.5 * (1 - painted[..., 3:]) + painted[..., :3])


def hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """HSV, 0..1 each [P], to RGB [P,3]."""
    sixth = (torch.tensor([5.0, 3.0, 1.0], device=hue.device) + 6 * hue[:, None]) % 6
    part = torch.minimum(sixth, 4 - sixth).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * part)
