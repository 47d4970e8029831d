"""What stands between a block's products: residual, norm and modulation; norm and rotation of q and k."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor

from conceptmaster.kernels import modulate as modulating
from conceptmaster.kernels import qk_norm_rope as rotating

from ..case import EPS, Case, Group, Shapes, compiled, wide

FAMILY = "between products"


def groups(shapes: Shapes) -> Iterator[Group]:
    """One for each size of `Shapes.rows`."""
    for name, size in shapes.rows():
        yield Group(FAMILY, name, functools.partial(_cases, shapes, name, *size))


def _cases(shapes: Shapes, name: str, batch: int, tokens: int, heads: int, width: int) -> Iterator[Case]:
    total = heads * width
    x, branch = shapes.new(batch, tokens, total), shapes.new(batch, tokens, total)
    table = 0.3 * shapes.new(batch, 3, total, dtype="float32")
    gate, scale, shift = table.unbind(1)
    shape, size = {"B": batch, "S": tokens, "D": total}, x.nbytes

    def separate(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        summed = modulating.residual_reference(x, branch, gate)
        return summed, modulating.norm_reference(summed, scale, shift, True, EPS)

    def exactly(rows: Tensor) -> tuple[Tensor, Tensor]:
        carried, added, g, factor, offset = wide(x[:, rows], branch[:, rows], gate, scale, shift)
        summed = modulating.residual_reference(carried, added, g)
        rounded = summed.to(x.dtype).double()  # the norm is of the row as it is written
        return summed, modulating.norm_reference(rounded, factor, offset, True, EPS)

    yield Case(
        f"residual and modulation, {name}", shape, shapes.dtype, tokens,
        functools.partial(modulating.residual_modulate, x, branch, gate, scale, shift),
        exactly, {"eager": functools.partial(separate, x, branch)}, moved_bytes=4 * size,
        compiled={"torch.compile": compiled(shapes.mode, separate, x, branch)},
    )  # fmt: skip

    q_weight, k_weight = 1 + 0.1 * shapes.new(2, total)
    angles = 6 * shapes.new(tokens, 1, width // 2, dtype="float32")
    cos, sin = angles.cos(), angles.sin()
    normed = functools.partial(rotating.qk_norm_rope_reference, eps=EPS)
    yield Case(
        f"norm and rotation, {name}", shape, shapes.dtype, tokens,
        functools.partial(rotating.qk_norm_rope, x, branch, q_weight, k_weight, cos, sin),
        lambda rows: normed(*wide(x[:, rows], branch[:, rows], q_weight, k_weight, cos[rows], sin[rows])),
        {"eager": functools.partial(normed, x, branch, q_weight, k_weight, cos, sin)}, moved_bytes=4 * size,
        compiled={"torch.compile": compiled(shapes.mode, normed, x, branch, q_weight, k_weight, cos, sin)},
    )  # fmt: skip
