"""Text and concepts, and the concepts alone, with and without the projection folded in.

The ops choose their kernel (kernels/cross_attention_choice.py): where they cannot have
Hopper's, the log says so, and they are as fast as the plain one, which is a rival here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptmaster.kernels import absorbed_injection as folded
from conceptmaster.kernels import cross_attention as crossing
from conceptmaster.kernels.cross_attention_plain import cross_attention_triton

from ..case import Case, Group, Shapes, compiled, fastest_first, wide
from ..timing import Call

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
            **_plain(q, (tk, tv), (ck, cv), mask),
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
            **_plain(q, None, (ck, cv), mask),
        },
        flops=4.0 * batch * tokens * heads * width * kept, moved_bytes=2 * size,
    )  # fmt: skip

    count = 4 if concepts % 4 == 0 else 1
    stripes = torch.arange(tokens, device=q.device)[:, None] * 8 // tokens  # eight, of which each sees half
    boxes = (stripes + torch.arange(count, device=q.device)).remainder(2).eq(0)[None]  # [1,S,N]
    yield Case(
        f"concept injection inside of boxes, {name}", shape, dtype, tokens,
        functools.partial(crossing.concept_injection, q, ck, cv, mask, boxes),
        lambda rows: alone(q[:, rows].double(), ck.double(), cv.double(), mask, None, boxes[:, rows]),
        {"eager, with the mask": functools.partial(alone, q, ck, cv, mask, None, boxes)},
        flops=4.0 * batch * tokens * heads * width * kept, moved_bytes=2 * size,
    )  # fmt: skip

    yield from _with_padding_as_one_key(shapes, name, shape, q, tk, tv, ck, cv, mask)

    total = heads * width
    x, weight = shapes.new(batch, tokens, total), shapes.new(total, total) * total**-0.5
    values = folded.absorbed_values(cv, weight)
    summed = x.clone()  # in place: right the first time, which is when it is checked

    def projected(x: Tensor, q: Tensor, ck: Tensor, cv: Tensor, mask: Tensor | None) -> Tensor:
        return x + F.linear(crossing.concept_injection(q, ck, cv, mask).flatten(2), weight)

    def projected_exactly(rows: Tensor) -> Tensor:
        exact = alone(*wide(q[:, rows], ck, cv, mask)).flatten(2)
        return x[:, rows].double() + F.linear(exact, weight.double())

    yield Case(
        f"injection with its projection folded in, {name}", shape, dtype, tokens,
        functools.partial(folded.absorbed_injection, summed, q, ck, values, mask),
        projected_exactly,
        {"injection, projection, sum": functools.partial(projected, x, q, ck, cv, mask)},
        flops=2.0 * batch * tokens * total * concepts * (1 + heads), moved_bytes=3 * size,
    )  # fmt: skip


def _plain(q: Tensor, *given: Any) -> dict[str, Call]:
    """The plain kernel as a rival, where there is a GPU."""
    return (
        {"the plain kernel": lambda: cross_attention_triton(torch.empty_like(q), q, *given)}
        if q.is_cuda
        else {}
    )


def _with_padding_as_one_key(
    shapes: Shapes,
    name: str,
    shape: dict[str, int],
    q: Tensor,
    tk: Tensor,
    tv: Tensor,
    ck: Tensor,
    cv: Tensor,
    mask: Tensor,
) -> Iterator[Case]:
    """Text of some 77 tokens and padding, whose keys are all one; the rivals have every key of it."""
    real, all_of_it, tokens = min(77, shape["T"] // 2), shape["T"], shape["S"]
    kept = min(-(-(real + 1) // 32) * 32, all_of_it)
    padding = (x[:, real : real + 1].expand(-1, all_of_it - real, -1, -1) for x in (tk, tv))
    tk, tv = (torch.cat((x[:, :real], same), dim=1) for x, same in zip((tk, tv), padding, strict=True))
    short_k, short_v = tk[:, :kept].contiguous(), tv[:, :kept].contiguous()
    bias = crossing.padding_bias(torch.full((shape["B"],), real, device=q.device), kept, all_of_it)
    alone, both = crossing.attention, crossing.decoupled_cross_attention_reference
    work = 4.0 * shape["B"] * tokens * shape["A"] * shape["E"]
    shape = shape | {"T": all_of_it, "keys": real + 1}

    def two_calls(q: Tensor, tk: Tensor, tv: Tensor, ck: Tensor, cv: Tensor) -> Tensor:
        return alone(q, tk, tv) + alone(q, ck[:, : shape["kept"]], cv[:, : shape["kept"]])

    yield Case(
        f"decoupled, padding as one key, {name}", shape, shapes.dtype, tokens,
        functools.partial(
            crossing.decoupled_cross_attention, q, short_k, short_v, ck, cv, mask, text_bias=bias
        ),
        lambda rows: both(*wide(q[:, rows], tk, tv, ck, cv, mask)),
        {"two SDPA calls and a sum, all text": fastest_first(two_calls, q, tk, tv, ck, cv)}
        | _plain(q, (short_k, short_v), (ck, cv), mask, None, bias),
        flops=work * (real + 1 + shape["kept"]), moved_bytes=2 * q.nbytes,
    )  # fmt: skip
    yield Case(
        f"text, padding as one key, {name}", shape, shapes.dtype, tokens,
        functools.partial(crossing.text_attention, q, short_k, short_v, bias),
        lambda rows: alone(*wide(q[:, rows], tk, tv)),
        {"SDPA, all text": fastest_first(alone, q, tk, tv)}
        | _plain(q, (short_k, short_v), None, None, None, bias),
        flops=work * (real + 1), moved_bytes=2 * q.nbytes,
    )  # fmt: skip
