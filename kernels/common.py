"""What the kernels share: Triton where it is installed, their torch ops, checks of tensors, and the launch.

Importing this compiles nothing. Without Triton the kernels are plain functions that `launch` refuses, and
everything runs by its reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
    "in_plain_torch",
    "kept_whole",
    "launch",
    "launches_to",
    "power_of_two",
    "require",
    "require_alike",
    "served",
    "tl",
    "to_fp8",
    "triton",
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


@dataclass
class TorchOp:
    """The torch op `torch.ops.conceptmaster.NAME`, and the choice between it and its reference.

    schema: "NAME(Tensor x, …) -> Tensor", in torch's notation. Four functions take the op's arguments. check
    raises ValueError with one line that says what is wrong; reference is the op in plain torch, cuda with
    Triton; empty gives its outputs, not filled. one_node: an exporter may keep the op, see `kept_whole`.
    """

    schema: str
    check: Callable[..., None]
    reference: Callable[..., Any]
    cuda: Callable[..., Any]
    empty: Callable[..., Any]
    one_node: bool = False
    op: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        """Registers the op."""
        name, signature = self.schema[: self.schema.index("(")], self.schema[self.schema.index("(") :]
        defined = torch.library.custom_op(
            f"conceptmaster::{name}", self._cpu, mutates_args=(), device_types="cpu", schema=signature
        )
        defined.register_kernel("cuda")(self._checked(self.cuda))
        defined.register_fake(self._checked(self.empty))
        self.op = getattr(torch.ops.conceptmaster, name).default

    def __call__(self, *arguments: Any) -> Any:
        """The op on CUDA, unless a gradient is wanted, a graph is being exported, or it is `in_plain_torch`.

        Otherwise the reference: the exporter gets it as plain torch, so that ONNX graphs hold standard
        operators, and autograd differentiates it.
        """
        kept = self.one_node and _whole and torch.compiler.is_exporting()
        if kept or served(*arguments):
            return self.op(*arguments)
        self.check(*arguments)
        return self.reference(*arguments)

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


def require_alike(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors have the first one's device and dtype, and a contiguous last axis.

    None is left out. On CUDA the dtype must be one of `KERNEL_DTYPES`.
    """
    (first_name, first), *others = [(n, t) for n, t in tensors.items() if t is not None]
    require(op, first.is_floating_point(), f"{first_name} must be floating point, not {_name(first.dtype)}")
    if first.is_cuda:
        known = ", ".join(map(_name, KERNEL_DTYPES))
        require(op, first.dtype in KERNEL_DTYPES, f"{first_name} is {_name(first.dtype)}: CUDA takes {known}")
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{op}: {first_name} is on {first.device}, {name} on {tensor.device}")
        if tensor.dtype != first.dtype:
            raise ValueError(f"{op}: {first_name} is {_name(first.dtype)}, {name} {_name(tensor.dtype)}")
    for name, tensor in [(first_name, first), *others]:
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{op}: the last axis of {name} is not contiguous: pass {name}.contiguous()")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def power_of_two(count: int, least: int, most: int) -> int:
    """The smallest power of two that is not below `count`, within `least` and `most`, which are such."""
    return min(most, max(least, 1 << (count - 1).bit_length()))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs a Triton kernel on the device of its first argument, a tensor; options: constexprs, num_warps, ….

    Raises RuntimeError without Triton.
    """
    if _launch is not None:
        return _launch(kernel, grid, *arguments, **options)
    if not INSTALLED:
        raise RuntimeError("Triton is not installed: pip install 'conceptmaster[gpu]'")
    device = arguments[0].device
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
