"""What a case of `make gpu` is: a kernel at one shape, its float64 reference, its rivals; and which shapes.

Letters: B batch (both guidance branches), S video tokens, T text tokens, C concept tokens, A heads, E head
width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from conceptmaster.kernels import self_attention as attending

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


@dataclass(frozen=True)
class Group:
    """Cases that share their tensors: `make` allocates them, so that one group at a time is alive. family:
    what stands for all of them where there are none; size: the name of the shape."""

    family: str
    size: str
    make: Callable[[], Iterator[Case]]

    @property
    def name(self) -> str:
        """What is reported where not even its tensors could be made."""
        return f"{self.family}, {self.size}"


COMPILE_MODE = "default"
"""Of `torch.compile`, where nothing else is asked for: the others take minutes."""


def compiled(mode: str, function: Callable[..., Any], *arguments: Any) -> Call:
    """Compiles when it is first called; in a rehearsal on a CPU it is only traced."""
    options: dict[str, Any] = {"mode": mode} if torch.cuda.is_available() else {"backend": "eager"}

    @functools.cache
    def made() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, **options)

    return lambda: made()(*arguments)


def fastest_first(function: Callable[..., Any], *arguments: Any) -> Call:
    """The call with PyTorch's attention in the order cuDNN, flash, memory-efficient, plain."""

    def run() -> Any:
        with sdpa_kernel(attending.FASTEST, set_priority=True):
            return function(*arguments)

    return run


def wide(*tensors: Tensor | None) -> list[Any]:
    """In float64, but for masks and None."""
    return [tensor if tensor is None or tensor.dtype == torch.bool else tensor.double() for tensor in tensors]


class Shapes:
    """Sizes that are run: the real ones, of these with `only` those whose name begins so, or `small` ones
    that a CPU gets through in seconds; in `dtype`, but for the 8-bit kernel, which is for bfloat16. mode:
    of `torch.compile`; fp8: whether the card computes in it."""

    def __init__(
        self,
        device: str,
        small: bool,
        only: str = "",
        dtype: str = "bfloat16",
        mode: str = COMPILE_MODE,
        fp8: bool = True,
    ) -> None:
        self.device, self.small, self.only, self.dtype, self.mode = device, small, only, dtype, mode
        self.fp8 = fp8
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
