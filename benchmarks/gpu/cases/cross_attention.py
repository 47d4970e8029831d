"""Text and concepts, and the concepts alone, with and without the projection folded in."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from conceptmaster.kernels import absorbed_injection as folded
from conceptmaster.kernels import cross_attention as crossing

from ..case import Case, Group, Shapes, compiled, fastest_first, wide

FAMILY = "cross-attention"


def groups(shapes: Shapes) -> Iterator[Group]:
    """One for each size of `Shapes.cross`."""
    for name, size in shapes.cross():
        yield Group(FAMILY, name, functools.partial(_cases, shapes, name, *size))


def _cases(
    shapes: Shapes,
    name: str,
    batch: int,
    tokens: int,
    text: int,
    concepts: int,
    kept: int,
    heads: int,
    width: int,
) -> Iterator[Case]:
    q, tk, tv, ck, cv = (
        shapes.new(batch, count, heads, width) for count in (tokens, text, text, concepts, concepts)
    )
    mask = shapes.mask(batch, concepts, kept)
    shape = {"B": batch, "S": tokens, "T": text, "C": concepts, "kept": kept, "A": heads, "E": width}
    dtype, size = shapes.dtype, q.nbytes
    both = crossing.decoupled_cross_attention_reference
    alone = crossing.attention

    def two_calls(q: Tensor, tk: Tensor, tv: Tensor, ck: Tensor, cv: Tensor) -> Tensor:
        # Without a mask, which the fastest of the rivals do not take: they get only the concepts that are
        # there.
        return alone(q, tk, tv) + alone(q, ck[:, :kept], cv[:, :kept])

    yield Case(
        f"decoupled cross-attention, {name}", shape, dtype, tokens,
        functools.partial(crossing.decoupled_cross_attention, q, tk, tv, ck, cv, mask),
        lambda rows: both(*wide(q[:, rows], tk, tv, ck, cv, mask)),
        {
            "two SDPA calls and a sum": fastest_first(two_calls, q, tk, tv, ck, cv),
            "eager, with the mask": functools.partial(both, q, tk, tv, ck, cv, mask),
        },
        flops=4.0 * batch * tokens * heads * width * (text + kept), moved_bytes=2 * size,
        compiled={"torch.compile": compiled(shapes.mode, two_calls, q, tk, tv, ck, cv)},
    )  # fmt: skip
    yield Case(
        f"concept injection, {name}", shape, dtype, tokens,
        functools.partial(crossing.concept_injection, q, ck, cv, mask),
        lambda rows: alone(*wide(q[:, rows], ck, cv, mask)),
        {
            "SDPA": fastest_first(alone, q, ck[:, :kept], cv[:, :kept]),
            "eager, with the mask": functools.partial(alone, q, ck, cv, mask),
        },
        flops=4.0 * batch * tokens * heads * width * kept, moved_bytes=2 * size,
    )  # fmt: skip

    total = heads * width
    x, weight = shapes.new(batch, tokens, total), shapes.new(total, total) * total**-0.5
    values = folded.absorbed_values(cv, weight)

    def projected(x: Tensor, q: Tensor, ck: Tensor, cv: Tensor, mask: Tensor | None) -> Tensor:
        return x + F.linear(crossing.concept_injection(q, ck, cv, mask).flatten(2), weight)

    def projected_exactly(rows: Tensor) -> Tensor:
        exact = alone(*wide(q[:, rows], ck, cv, mask)).flatten(2)
        return x[:, rows].double() + F.linear(exact, weight.double())

    yield Case(
        f"injection with its projection folded in, {name}", shape, dtype, tokens,
        functools.partial(folded.absorbed_injection, x, q, ck, values, mask),
        projected_exactly,
        {"injection, projection, sum": functools.partial(projected, x, q, ck, cv, mask)},
        flops=2.0 * batch * tokens * total * concepts * (1 + heads), moved_bytes=3 * size,
    )  # fmt: skip
