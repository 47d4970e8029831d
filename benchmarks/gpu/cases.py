"""What `make gpu` checks and measures: every kernel, its float64 reference, its rivals, at the shapes that
count.

Letters: B batch (both guidance branches), S video tokens, T text tokens, C concept tokens, A heads, E head
width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from conceptmaster.kernels import absorbed_injection as folded
from conceptmaster.kernels import cross_attention as crossing
from conceptmaster.kernels import fp8_linear as linear
from conceptmaster.kernels import modulate as modulating
from conceptmaster.kernels import qk_norm_rope as rotating
from conceptmaster.kernels import self_attention as attending
from conceptmaster.kernels.tolerances import RELATIVE_L2

from .timing import Call

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    ours() computes it; exact(rows) the same in float64 for some tokens, an int64 tensor of places along S.
    l2: the relative L2 error that is allowed, None for the elementwise table. flops: of one call, 0 where
    memory is the limit.
    """

    name: str
    shape: dict[str, int]
    dtype: str
    tokens: int
    ours: Call
    exact: Callable[[Tensor], Any]
    rivals: dict[str, Call]
    flops: float = 0.0
    moved_bytes: float = 0.0
    l2: float | None = None
    compiled: dict[str, Call] = field(default_factory=dict)


COMPILE_MODE = "default"
"""Of `torch.compile`, where nothing else is asked for: the others take minutes."""


def _compiled(mode: str, function: Callable[..., Any], *arguments: Any) -> Call:
    """Compiles when it is first called."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, mode=mode)

    return lambda: compiled()(*arguments)


def fastest_first(function: Callable[..., Any], *arguments: Any) -> Call:
    """The call with PyTorch's attention in the order cuDNN, flash, memory-efficient, plain."""

    def run() -> Any:
        with sdpa_kernel(attending.FASTEST, set_priority=True):
            return function(*arguments)

    return run


def _wide(*tensors: Tensor | None) -> list[Any]:
    return [tensor if tensor is None or tensor.dtype == torch.bool else tensor.double() for tensor in tensors]


class Shapes:
    """Sizes that are run: the real ones, of these with `only` those whose name begins so, or `small` ones
    that a CPU gets through in seconds; in `dtype`, but for the 8-bit kernel, which is for bfloat16. mode:
    of `torch.compile`."""

    def __init__(
        self, device: str, small: bool, only: str = "", dtype: str = "bfloat16", mode: str = COMPILE_MODE
    ) -> None:
        self.device, self.small, self.only, self.dtype, self.mode = device, small, only, dtype, mode
        self.generator = torch.Generator(device=device).manual_seed(0)

    def new(self, *shape: int, dtype: str | None = None) -> Tensor:
        """Normal numbers."""
        drawn = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return drawn.to(getattr(torch, dtype or self.dtype))

    def mask(self, batch: int, concepts: int, kept: int) -> Tensor:
        """bool [B,C]: no concepts in the first branch, `kept` of them in the others."""
        mask = torch.zeros((batch, concepts), dtype=torch.bool, device=self.device)
        mask[1:, :kept] = True
        return mask

    def cross(self) -> Iterator[tuple[str, tuple[int, int, int, int, int, int, int]]]:
        """(name, (B, S, T, C, C not masked, A, E))."""
        if self.small:
            yield "small", (2, 40, 9, 8, 5, 2, 16)
            return
        for concepts in (1, 2, 4):
            yield f"1.3B 480p, {concepts} concepts", (2, 32760, 512, 64, 16 * concepts, 12, 128)
        yield "1.3B 480p, 256 concept tokens", (2, 32760, 512, 256, 256, 12, 128)
        yield "1.3B 720p, 4 concepts", (2, 75600, 512, 64, 64, 12, 128)
        yield "14B 480p, 4 concepts", (2, 32760, 512, 64, 64, 40, 128)
        yield "2048 tokens, 4 concepts", (2, 2048, 512, 64, 64, 12, 128)
        yield "sprites, 4 concepts", (2, 80, 48, 256, 256, 12, 32)
        yield "odd", (3, 1001, 77, 13, 5, 5, 24)

    def rows(self) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
        """(name, (B, S, A, E))."""
        if self.small:
            yield "small", (2, 12, 2, 16)
            return
        yield "1.3B 480p", (2, 32760, 12, 128)
        yield "14B 480p", (2, 32760, 40, 128)
        yield "sprites", (2, 80, 12, 32)
        yield "odd", (3, 1001, 5, 24)


def cases(shapes: Shapes) -> Iterator[Callable[[], Iterator[Case]]]:
    """One function for each kernel and shape; calling it allocates the tensors, so that one at a time is
    alive.
    """
    for name, size in shapes.cross():
        if name.startswith(shapes.only):
            yield functools.partial(_cross_cases, shapes, name, *size)
    for name, row in shapes.rows():
        if name.startswith(shapes.only):
            yield functools.partial(_row_cases, shapes, name, *row)
            if shapes.dtype == "bfloat16":
                yield functools.partial(_eight_bit_cases, shapes, name, *row)


def _cross_cases(
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
        lambda rows: both(*_wide(q[:, rows], tk, tv, ck, cv, mask)),
        {
            "two SDPA calls and a sum": fastest_first(two_calls, q, tk, tv, ck, cv),
            "eager, with the mask": functools.partial(both, q, tk, tv, ck, cv, mask),
        },
        flops=4.0 * batch * tokens * heads * width * (text + kept), moved_bytes=2 * size,
        compiled={"torch.compile": _compiled(shapes.mode, two_calls, q, tk, tv, ck, cv)},
    )  # fmt: skip
    yield Case(
        f"concept injection, {name}", shape, dtype, tokens,
        functools.partial(crossing.concept_injection, q, ck, cv, mask),
        lambda rows: alone(*_wide(q[:, rows], ck, cv, mask)),
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
        exact = alone(*_wide(q[:, rows], ck, cv, mask)).flatten(2)
        return x[:, rows].double() + F.linear(exact, weight.double())

    yield Case(
        f"injection with its projection folded in, {name}", shape, dtype, tokens,
        functools.partial(folded.absorbed_injection, x, q, ck, values, mask),
        projected_exactly,
        {"injection, projection, sum": functools.partial(projected, x, q, ck, cv, mask)},
        flops=2.0 * batch * tokens * total * concepts * (1 + heads), moved_bytes=3 * size,
    )  # fmt: skip


def _row_cases(shapes: Shapes, name: str, batch: int, tokens: int, heads: int, width: int) -> Iterator[Case]:
    total = heads * width
    x, branch = shapes.new(batch, tokens, total), shapes.new(batch, tokens, total)
    table = 0.3 * shapes.new(batch, 3, total, dtype="float32")
    gate, scale, shift = table.unbind(1)
    shape, size = {"B": batch, "S": tokens, "D": total}, x.nbytes

    def separate(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        summed = modulating.residual_reference(x, branch, gate)
        return summed, modulating.norm_reference(summed, scale, shift, True, EPS)

    def exactly(rows: Tensor) -> tuple[Tensor, Tensor]:
        carried, added, g, factor, offset = _wide(x[:, rows], branch[:, rows], gate, scale, shift)
        summed = modulating.residual_reference(carried, added, g)
        rounded = summed.to(x.dtype).double()  # the norm is of the row as it is written
        return summed, modulating.norm_reference(rounded, factor, offset, True, EPS)

    yield Case(
        f"residual and modulation, {name}", shape, shapes.dtype, tokens,
        functools.partial(modulating.residual_modulate, x, branch, gate, scale, shift),
        exactly, {"eager": functools.partial(separate, x, branch)}, moved_bytes=4 * size,
        compiled={"torch.compile": _compiled(shapes.mode, separate, x, branch)},
    )  # fmt: skip

    q_weight, k_weight = 1 + 0.1 * shapes.new(2, total)
    angles = 6 * shapes.new(tokens, 1, width // 2, dtype="float32")
    cos, sin = angles.cos(), angles.sin()
    normed = functools.partial(rotating.qk_norm_rope_reference, eps=EPS)
    yield Case(
        f"norm and rotation, {name}", shape, shapes.dtype, tokens,
        functools.partial(rotating.qk_norm_rope, x, branch, q_weight, k_weight, cos, sin),
        lambda rows: normed(*_wide(x[:, rows], branch[:, rows], q_weight, k_weight, cos[rows], sin[rows])),
        {"eager": functools.partial(normed, x, branch, q_weight, k_weight, cos, sin)}, moved_bytes=4 * size,
        compiled={"torch.compile": _compiled(shapes.mode, normed, x, branch, q_weight, k_weight, cos, sin)},
    )  # fmt: skip


def _eight_bit_cases(
    shapes: Shapes, name: str, batch: int, tokens: int, heads: int, width: int
) -> Iterator[Case]:
    batch, total = 1, heads * width  # one branch is enough to see it
    if total % 16:
        return
    x, weight, bias = shapes.new(batch, tokens, total), shapes.new(4 * total, total), shapes.new(4 * total)
    weight8, scale = linear.quantise_rows(weight)
    yield Case(
        f"fp8 linear, {name}", {"M": batch * tokens, "I": total, "O": 4 * total}, "bfloat16", tokens,
        functools.partial(linear.fp8_linear, x, weight8, scale, bias),
        lambda rows: F.linear(*_wide(x[:, rows], weight, bias)),
        {"bfloat16": functools.partial(F.linear, x, weight, bias)},
        flops=8.0 * batch * tokens * total**2, l2=RELATIVE_L2["linear8"],
    )  # fmt: skip
