"""What computes in 8 bits: only bfloat16 gets there, and only on cards that have fp8."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch.nn.functional as F

from conceptmaster.kernels import fp8_linear as linear
from conceptmaster.kernels.tolerances import RELATIVE_L2

from ..case import Case, Group, Shapes, wide

FAMILY = "8 bits"
FEED_FORWARD = {1536: 8960, 5120: 13824}
"""By a model's width, Wan2.1's two, how wide its feed-forward is inside."""


def groups(shapes: Shapes) -> Iterator[Group]:
    """One for each size of `Shapes.rows`; none for other dtypes, and on cards without fp8."""
    if shapes.dtype != "bfloat16" or not shapes.fp8:
        return
    for name, size in shapes.rows():
        yield Group(FAMILY, name, functools.partial(_cases, shapes, name, *size))


def _cases(shapes: Shapes, name: str, batch: int, tokens: int, heads: int, width: int) -> Iterator[Case]:
    batch, total = 1, heads * width  # one branch is enough to see it
    if total % 16:
        return
    x, weight, bias = shapes.new(batch, tokens, total), shapes.new(4 * total, total), shapes.new(4 * total)
    weight8, scale = linear.quantise_rows(weight)
    yield Case(
        f"fp8 linear, {name}", {"M": batch * tokens, "I": total, "O": 4 * total}, "bfloat16", tokens,
        functools.partial(linear.fp8_linear, x, weight8, scale, bias),
        lambda rows: F.linear(*wide(x[:, rows], weight, bias)),
        {"bfloat16": functools.partial(F.linear, x, weight, bias)},
        flops=8.0 * batch * tokens * total**2, l2=RELATIVE_L2["linear8"],
    )  # fmt: skip
    hidden = FEED_FORWARD.get(total, 2 * total)
    x, weight = shapes.new(batch, tokens, hidden), shapes.new(total, hidden) * hidden**-0.5
    bias = shapes.new(total)
    narrow8, narrow_scale = linear.quantise_rows(weight)
    gelu = functools.partial(F.gelu, approximate="tanh")
    yield Case(
        f"fp8 linear behind a GELU, {name}", {"M": batch * tokens, "I": hidden, "O": total}, "bfloat16",
        tokens,
        functools.partial(linear.fp8_linear, x, narrow8, narrow_scale, bias, gelu=True),
        lambda rows: F.linear(gelu(x[:, rows].double()), *wide(weight, bias)),
        {"bfloat16": lambda: F.linear(gelu(x), weight, bias)},
        flops=2.0 * batch * tokens * hidden * total, l2=RELATIVE_L2["linear8"],
    )  # fmt: skip
