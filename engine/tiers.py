"""Tiers: how much of the transformer is computed in 8 bits, as a table, and the layers that it puts in place.

What stands in TIERS was chosen by `python -m conceptmaster.benchmarks.tiers` with the identity gate
on the shipped model; docs/performance.md has the errors of every rung.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..kernels.fp8_linear import Fp8Linear

PARTS: dict[str, tuple[str, ...]] = {
    "qkv": ("attn1.to_qkv",),
    "attention": (),
    "out": ("attn1.to_out.0",),
    "cross": ("block.attn2.to_q", "block.attn2.to_out.0"),
    "injector": ("block.injector.to_q", "block.injector.to_out"),
    "up": ("block.ffn.net.0.proj",),
    "down": ("block.ffn.net.2",),
}
"""Of a fused block, what may be in 8 bits, and the linear layers that it is. `attention` is self-attention.
What runs once per request, keys and values of text and concepts, is not among them."""


@dataclass(frozen=True)
class EightBits:
    """What is in 8 bits.

    parts: of PARTS. first_layers, last_layers: so many blocks, and first_steps, last_steps: so many steps of
    a video, stay in 16 bits; with steps both kinds of weights are kept. fast: parts whose products sum up in
    the tensor cores (`fp8_linear`). Raises ValueError for other parts, and numbers below 0.
    """

    parts: tuple[str, ...] = tuple(PARTS)
    first_layers: int = 0
    last_layers: int = 0
    first_steps: int = 0
    last_steps: int = 0
    fast: tuple[str, ...] = ("qkv", "out", "cross", "injector", "up")

    def __post_init__(self) -> None:
        for part in (*self.parts, *self.fast):
            if part not in PARTS:
                raise ValueError(f"unknown part {part!r}: choose of {', '.join(PARTS)}")
        for name in ("first_layers", "last_layers", "first_steps", "last_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")

    def layer(self, index: int, layers: int) -> bool:
        """Whether this block, of so many, is in 8 bits."""
        return self.first_layers <= index < layers - self.last_layers

    def step(self, index: int, steps: int) -> bool:
        """Whether this step, of so many, is in 8 bits."""
        return self.first_steps <= index < steps - self.last_steps


TIERS: dict[str, EightBits | None] = {"lossless": None, "high": EightBits()}


def quantise(fused: nn.Module, bits: EightBits, absorb: bool) -> None:
    """Puts a fused block's linear layers in fp8, in place, where a GPU can multiply so: both widths divide by
    16.

    absorb: whether the injector's output projection is folded into its values: it stays as it is.
    """
    for part in bits.parts:
        for name in PARTS[part]:
            if not (absorb and name == "block.injector.to_out"):
                _replace(fused, name, part in bits.fast)
    if {"up", "down"} <= set(bits.parts):
        _gelu_with_down(fused)
    if "attention" in bits.parts:
        cast("Any", fused.attn1).attend_in_fp8()


def _replace(fused: nn.Module, name: str, fast: bool) -> None:
    *path, own = name.split(".")
    try:
        linear = fused.get_submodule(name)
    except AttributeError:
        return  # this variant has no such part
    assert isinstance(linear, nn.Linear)
    if linear.in_features % 16 or linear.out_features % 16:
        return
    owner = fused
    for part in path:  # copies of what leads there, which others may go on using as it is
        copied = copy.copy(owner._modules[part])
        assert copied is not None
        copied.__dict__["_modules"] = dict(copied._modules)
        owner._modules[part] = copied
        owner = copied
    owner._modules[own] = Fp8Linear(linear, fast=fast)


def _gelu_with_down(fused: nn.Module) -> None:
    """The feed-forward's GELU where its second layer quantises, if both are in fp8 and it is the tanh one."""
    net = fused.get_submodule("block.ffn.net")
    assert isinstance(net, nn.Sequential)
    first, last = net[0], net[2]
    if isinstance(first.proj, Fp8Linear) and isinstance(last, Fp8Linear) and first.approximate == "tanh":
        last.gelu = True
        net[0] = first.proj
