"""What the kernels share: Triton where it is installed, their torch ops, checks of tensors, and the launch.

Importing this compiles nothing. Without Triton the kernels are plain functions that `launch` refuses, and
everything runs by its reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import how_to_install

try:
    import triton
    import triton.language as tl

    INSTALLED = True
except ImportError:
    INSTALLED = False

    class _Absent:
        """Takes the place of Triton: lets the kernels be defined."""

        @staticmethod
        def jit(function: Callable[..., Any]) -> Callable[..., Any]:
            """The function as it is."""
            return function

    triton = tl = _Absent()

__all__ = [
    "INTERPRETED",
    "TorchOp",
    "check_operands",
    "in_plain_torch",
    "kept_whole",
    "launch",
    "launches_to",
    "operands",
    "power_of_two",
    "require",
    "served",
    "tl",
    "to_fp8",
    "triton",
    "wide",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU. It does arithmetic on the raw bits of bfloat16, so
that there every kernel widens what it has loaded to float32."""

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the Triton kernels compute on; the references also take float64."""


@triton.jit
def to_fp8(x, ROUND: tl.constexpr):
    """float32 to float8_e4m3fn, to the nearest; ROUND: the interpreter cuts off what it should round."""
    if ROUND:
        x = ((x.to(tl.int32, bitcast=True) + 0x80000) & -0x100000).to(tl.float32, bitcast=True)
    return x.to(tl.float8e4nv)


_launch: Callable[..., None] | None = None  # what `launches_to` has put in the place of a real launch


class Operand(NamedTuple):
    """A tensor that an op takes: its name, its dtype and the letters of its axes.

    As text "k BCAE": a letter stands for the same size wherever it is, a small one for that size or 1, 1 for
    itself, and a leading * for one or more axes of any size. Without a dtype it is the first operand's;
    "mask? bool BC" says one of `_DTYPES`, and that it may be None.
    """

    name: str
    dtype: str
    axes: str


def operands(text: str) -> tuple[Operand, ...]:
    """Those of "q BSAE, k BCAE, mask? bool BC", see `Operand`."""
    parts = [part.split() for part in text.split(", ")]
    return tuple(Operand(name.rstrip("?"), " ".join(dtype), axes) for name, *dtype, axes in parts)


_DTYPES: dict[str, Callable[[torch.dtype], tuple[torch.dtype, ...]]] = {
    "": lambda first: (first,),
    "bool": lambda first: (torch.bool,),
    "fp8": lambda first: (torch.float8_e4m3fn,),
    "float32": lambda first: (torch.float32,),
    "wide": lambda first: (torch.promote_types(first, torch.float32),),
    "float32 or wide": lambda first: (torch.float32, torch.promote_types(first, torch.float32)),
}
"""Beside a first operand of some dtype, those that another may have."""


def check_operands(op: str, wanted: Sequence[Operand], tensors: Sequence[Tensor | None]) -> dict[str, int]:
    """The size that each letter stands for.

    Raises ValueError, one line that begins with `op`, for another device, dtype or shape than `wanted`, an
    empty tensor, or a last axis that is not contiguous. The first operand is of floating point; on CUDA its
    dtype must be one of `KERNEL_DTYPES`.
    """
    first, lead, sizes = tensors[0], wanted[0].name, {"1": 1}
    assert first is not None
    require(op, first.is_floating_point(), f"{lead} must be floating point, not {_name(first.dtype)}")
    known = ", ".join(map(_name, KERNEL_DTYPES))
    right = not first.is_cuda or first.dtype in KERNEL_DTYPES
    require(op, right, f"{lead} is {_name(first.dtype)}: CUDA takes {known}")
    for operand, tensor in zip(wanted, tensors, strict=True):
        if tensor is None:
            continue
        name, dtypes, bound = operand.name, _DTYPES[operand.dtype](first.dtype), dict(sizes)
        if tensor.device != first.device:
            raise ValueError(f"{op}: {lead} is on {first.device}, {name} on {tensor.device}")
        if not operand.dtype and tensor.dtype != first.dtype:
            raise ValueError(f"{op}: {lead} is {_name(first.dtype)}, {name} {_name(tensor.dtype)}")
        if tensor.dtype not in dtypes or not _binds(operand.axes, tensor.shape, bound):
            prefix, found = (f"{_name(dtypes[0])} ", f"{_name(tensor.dtype)} ") if operand.dtype else ("", "")
            shape = _spelled(operand.axes, sizes)
            raise ValueError(f"{op}: {name} must be {prefix}{shape}, not {found}{list(tensor.shape)}")
        if not tensor.numel():
            raise ValueError(f"{op}: {name} is empty: {list(tensor.shape)}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{op}: the last axis of {name} is not contiguous: pass {name}.contiguous()")
        sizes = bound
    return sizes


def _binds(axes: str, shape: torch.Size, sizes: dict[str, int]) -> bool:
    """Whether a shape has these axes; adds the sizes of new letters."""
    if axes.startswith("*") and len(shape) >= len(axes):
        axes, shape = axes[1:], shape[1 - len(axes) :]
    if len(axes) != len(shape):
        return False
    pairs = [(a, n) for a, n in zip(axes, shape, strict=True) if not (a.islower() and n == 1)]
    return all(sizes.setdefault(a.upper(), n) == n for a, n in pairs)


def _spelled(axes: str, sizes: dict[str, int]) -> str:
    """[2,C,12], of letters whose size is not known yet as they are."""
    parts = [("..." if a == "*" else str(sizes.get(a.upper(), a.upper()))) for a in axes]
    return f"[{','.join(f'{p} or 1' if a.islower() else p for a, p in zip(axes, parts, strict=True))}]"


@dataclass
class TorchOp:
    """The torch op `torch.ops.conceptmaster.NAME`, and the choice between it and its reference.

    It takes tensors, see `operands`, then scalars, and gives `outputs` tensors. The functions take the same:
    reference is the op in plain torch, cuda with Triton; empty gives the outputs, not filled; further, if
    any, raises ValueError for what `check_operands` does not see. limits: the largest sizes on CUDA, by
    letter. one_node: an exporter may keep it, see `kept_whole`.
    """

    name: str
    tensors: str
    reference: Callable[..., Any]
    cuda: Callable[..., Any]
    empty: Callable[..., Any]
    scalars: str = ""
    outputs: int = 1
    limits: Mapping[str, int] = field(default_factory=dict)
    further: Callable[..., None] | None = None
    one_node: bool = False
    op: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        """Registers the op."""
        self._operands = operands(self.tensors)
        names = [part.split()[0] for part in self.tensors.split(", ")]
        taken = [f"Tensor? {n[:-1]}" if n.endswith("?") else f"Tensor {n}" for n in names]
        gives = "Tensor" if self.outputs == 1 else f"({', '.join(['Tensor'] * self.outputs)})"
        schema = f"({', '.join([*taken, self.scalars] if self.scalars else taken)}) -> {gives}"
        defined = torch.library.custom_op(
            f"conceptmaster::{self.name}", self._cpu, mutates_args=(), device_types="cpu", schema=schema
        )
        defined.register_kernel("cuda")(self._checked(self.cuda))
        defined.register_fake(self._checked(self.empty))
        self.op = getattr(torch.ops.conceptmaster, self.name).default

    def __call__(self, *arguments: Any) -> Any:
        """The op on CUDA, unless a gradient is wanted, a graph is being exported, or it is `in_plain_torch`.

        Otherwise the reference: the exporter gets it as plain torch, so that ONNX graphs hold standard
        operators, and autograd differentiates it. Raises ValueError for what the op does not take.
        """
        kept = self.one_node and _whole and torch.compiler.is_exporting()
        if kept or served(*arguments):
            return self.op(*arguments)
        self.check(*arguments)
        return self.reference(*arguments)

    def check(self, *arguments: Any) -> None:
        """Raises ValueError with one line that says what is wrong."""
        sizes = check_operands(self.name, self._operands, arguments[: len(self._operands)])
        for letter, most in self.limits.items():
            if arguments[0].is_cuda and sizes[letter] > most:
                raise ValueError(f"{self.name}: on CUDA {letter} is {most} at most, not {sizes[letter]}")
        if self.further is not None:
            self.further(*arguments)

    def _cpu(self, *arguments: Any) -> Any:
        self.check(*arguments)
        found = self.reference(*arguments)
        return found.contiguous() if isinstance(found, Tensor) else tuple(x.contiguous() for x in found)

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.check(*arguments)
            return function(*arguments)

        return call


def served(*arguments: Any) -> bool:
    """Whether a kernel may compute from these arguments: their tensors are on CUDA, no gradient is wanted, no
    graph is being exported, not `in_plain_torch`."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if _plain or torch.compiler.is_exporting() or not all(tensor.is_cuda for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


_plain = False  # whether `in_plain_torch` is in force


@contextmanager
def in_plain_torch() -> Iterator[None]:
    """Lets the references run in the place of the kernels: what these are held to, and measured against."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


_whole = False  # whether `kept_whole` is in force


@contextmanager
def kept_whole() -> Iterator[None]:
    """Lets an exporter meet the ops that may be `one_node` themselves, instead of their references."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


def require(op: str, condition: bool, message: str) -> None:
    """Raises ValueError "op: message" unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {message}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: norms and modulation are computed there, whatever the weights' dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def power_of_two(count: int, least: int, most: int) -> int:
    """The smallest power of two that is not below `count`, within `least` and `most`, which are such."""
    return min(most, max(least, 1 << (count - 1).bit_length()))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs a Triton kernel on the device of its first tensor; options: constexprs, num_warps, ….

    Raises RuntimeError without Triton.
    """
    if _launch is not None:
        return _launch(kernel, grid, *arguments, **options)
    if not INSTALLED:
        raise RuntimeError(f"Triton is not installed: {how_to_install('gpu')}")
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options)


@contextmanager
def launches_to(record: Callable[..., None]) -> Iterator[None]:
    """Hands every launch to `record(kernel, grid, *arguments, **options)`: to compile what would have run."""
    global _launch
    before, _launch = _launch, record
    try:
        yield
    finally:
        _launch = before
