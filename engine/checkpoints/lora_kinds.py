"""The kinds of change that a LoRA file may hold, each from its own parts, and how one is added to a weight.

    LoRA     up @ down, or up, mid and down as one tensor (Tucker)     Hu et al. 2021; LyCORIS's LoCon
    LoHa     (w1_a @ w1_b) * (w2_a @ w2_b), element by element         Hyeon-Woo et al. 2021
    LoKr     kron(w1, w2), each whole or the product of its a and b    Yeh et al. 2023 (LyCORIS)
    whole    the difference itself

times alpha / rank, as PEFT, LyCORIS and ComfyUI have them. DoRA (Liu et al. 2024) scales the sum of weight
and change to given lengths: of each row (PEFT's lora_magnitude_vector), or of each row or column (LyCORIS's
`dora_scale`, by its shape). PEFT applies the scale of a LoRA to the change inside of that sum; ComfyUI, which
people use files with `dora_scale` in, to the difference from the old weight. The lengths that are scaled are
the sum's, as both trainers have it; ComfyUI takes the old weight's where they are of rows.

Letters: r rank, o and i a weight's rows and the size of each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
LARGEST_RANK = 1024  # beyond it, and beyond both sides of the weight, it is no low rank


class Part(NamedTuple):
    """One tensor of the file, and the key that it has there."""

    key: str
    tensor: Tensor

    def __str__(self) -> str:
        return f"{self.key} {tuple(self.tensor.shape)}"


def _tucker(mid: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """mid [m,n,…], up [o,m], down [n,i] -> [o,i,…]."""
    return torch.einsum("mn...,om,ni->oi...", mid, up, down)


def _low_rank(parts: Tensors) -> Tensor:
    up, down = parts["up"].flatten(1), parts["down"].flatten(1)  # [o,r], [r,i]
    return _tucker(parts["mid"], up, down) if "mid" in parts else up @ down


def _product(parts: Tensors, side: str, mid: str) -> Tensor:
    """LoHa's or LoKr's factor `side`: whole, or of its a and b, with `mid` between them if there is one."""
    if side in parts:
        return parts[side]
    a, b = parts[f"{side}_a"], parts[f"{side}_b"]
    return _tucker(parts[mid], a.T, b) if mid in parts else a @ b


def _hadamard(parts: Tensors) -> Tensor:
    one, two = _product(parts, "hada_w1", "hada_t1"), _product(parts, "hada_w2", "hada_t2")
    if one.shape != two.shape:  # else it would be repeated
        raise ValueError
    return one * two


def _kronecker(parts: Tensors) -> Tensor:
    one, two = _product(parts, "lokr_w1", "lokr_t1"), _product(parts, "lokr_w2", "lokr_t2")
    one = one.reshape(*one.shape, *(1,) * (two.ndim - one.ndim))
    return torch.kron(one, two.contiguous())  # which views what einsum has made


def _whole(parts: Tensors) -> Tensor:
    (difference,) = parts.values()
    return difference


class Kind(NamedTuple):
    """A kind of change: what computes it, of which parts in each of its forms, and which of them have the
    rank as their first size (the first that is there counts)."""

    name: str
    compute: Callable[[Tensors], Tensor]
    forms: tuple[tuple[str, ...], ...]
    ranked: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """Every part that it may have."""
        return {name for form in self.forms for name in form}


_TUCKER = ("hada_t1", "hada_t2")
_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LEFT = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_RIGHT = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
LORA = Kind("LoRA", _low_rank, (("up", "down"), ("up", "mid", "down")), ("down",))
LOHA = Kind("LoHa", _hadamard, (_HADAMARD, (*_HADAMARD, *_TUCKER)), ("hada_w1_b",))
LOKR = Kind("LoKr", _kronecker, tuple(a + b for a, b in product(_LEFT, _RIGHT)), ("lokr_w2_b", "lokr_w1_b"))
WHOLE = Kind("whole difference", _whole, (("diff",), ("diff_b",), ("up_bias",)))
PRODUCTS = (LORA, LOHA, LOKR)


@dataclass(frozen=True)
class Change:
    """What one of the transformer's tensors, `target`, gains: `factor` times what `kind` makes of `parts`.

    lengths: of DoRA, those of the rows or columns of the sum; inside: PEFT's, else ComfyUI's, see above.
    """

    target: str
    kind: Kind
    parts: Mapping[str, Part]
    factor: float = 1.0
    lengths: Part | None = None
    inside: bool = False

    @property
    def rank(self) -> int | None:
        """The pair's; None of other kinds."""
        return self.parts["down"].tensor.shape[0] if self.kind is LORA else None

    def made(self) -> torch.Size | None:
        """The shape that the parts make, computed without numbers; None where they do not go together."""
        try:
            return self.kind.compute({n: p.tensor.to("meta") for n, p in self.parts.items()}).shape
        except (RuntimeError, IndexError, ValueError):
            return None

    def misfit(self, shape: torch.Size) -> str | None:
        """None, or in words how this does not fit a target of that shape."""
        made, parts = self.made(), [*self.parts.values(), *([] if self.lengths is None else [self.lengths])]
        fits = made is not None and made.numel() == shape.numel() and made[:1] == shape[:1]
        if self.kind is WHOLE:
            fits = made == shape
        elif self.kind is LORA:
            fits = (
                fits and len(shape) > 1 and (self.rank or 0) <= max(shape[0], shape[1:].numel(), LARGEST_RANK)
            )
        if fits and (self.lengths is None or self._axis(shape) is not None):
            return None
        return f"{self.target} is {tuple(shape)}, {' and '.join(map(str, parts))}"

    def _axis(self, shape: torch.Size) -> int | None:
        """Of which axis of the weight `lengths` has one number for each entry; None where of none."""
        assert self.lengths is not None
        given = self.lengths.tensor.shape
        along = [
            tuple(n if k == axis else 1 for k, n in enumerate(shape)) for axis in range(min(2, len(shape)))
        ]
        if self.inside:  # PEFT's, of a convolution with a 1 before it
            return 0 if given.numel() == shape[0] == max(given, default=0) else None
        if given == shape[:1]:
            return 0
        return along.index(tuple(given)) if tuple(given) in along else None

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Adds scale times this to `weight`, in float32 at least; rounded once, to the weight's dtype."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        parts = {name: part.tensor.to(weight.device, wide) for name, part in self.parts.items()}
        change, old = self.factor * self.kind.compute(parts).reshape(weight.shape), weight.to(wide)
        if self.lengths is None:
            weight.copy_(old + scale * change)
        elif self.inside:
            weight.copy_(self._scaled(old + scale * change))
        else:
            weight.copy_(old + scale * (self._scaled(old + change) - old))

    def _scaled(self, total: Tensor) -> Tensor:
        """`total` with its rows or columns of the lengths that are given; what is all zero stays."""
        assert self.lengths is not None and (axis := self._axis(total.shape)) is not None
        others = tuple(k for k in range(total.ndim) if k != axis)
        found = torch.linalg.vector_norm(total, dim=others, keepdim=True)
        wanted = self.lengths.tensor.to(total.device, total.dtype).reshape(found.shape)
        return total * (wanted / found.clamp_min(torch.finfo(total.dtype).tiny))
