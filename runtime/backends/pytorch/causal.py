"""A half of a causal decoder or encoder, as a graph that takes any number of latent frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ...bundle_format.schema import GraphFile, TensorSpec
from .stepper import Capture, Captured, Place


def causal_half(
    signature: GraphFile, module: torch.nn.Module, capture: Capture | None
) -> Callable[[dict[str, Any]], Mapping[str, Any]]:
    """Inputs by name -> outputs by name; states are in the module's own dtype and layout.

    capture: how it is made replayable, once for each number of latent frames; None to run it as it is.
    """
    programs: dict[torch.Size, Captured] = {}
    places: dict[str, Place] = {}

    def run(**named: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(module(*(_channels_first(tensor) for tensor in named.values())))

    def call(tensors: dict[str, Any]) -> Mapping[str, Any]:
        named = {spec.name: _channels_last(tensors[spec.name]) for spec in signature.inputs}
        if capture is None:
            outputs = run(**named)
        else:
            shape = named[signature.inputs[0].name].shape
            if shape not in programs:
                if not places:  # a video's first call is its longest
                    places.update({name: Place(tensor) for name, tensor in named.items()})
                with _fastest_convolutions():
                    programs[shape] = Captured(run, places, named, capture)
            outputs = programs[shape](named)
        return {spec.name: value for spec, value in zip(signature.outputs, outputs, strict=True)}

    return call


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """[1,C,F,H,W] -> [1,F,H,W,C], as states lie, so that they are copied as they are; others unchanged."""
    return x.movedim(1, -1) if x.dim() == 5 else x


def _channels_first(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(-1, 1) if x.dim() == 5 else x


@contextmanager
def _fastest_convolutions() -> Iterator[None]:
    """Lets cuDNN try its algorithms, once for each shape: what is captured stays with the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def of_any_length(spec: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    """`spec`, of as many latent frames (or their video frames) as an array of this shape is of."""
    axis = {"latents": 2, "frames": 0}.get(spec.name)
    if axis is None or len(shape) != len(spec.shape):
        return spec
    each, sizes = spec.shape[axis], list(spec.shape)
    sizes[axis] = max(1, shape[axis] // each) * each
    return dataclasses.replace(spec, shape=tuple(sizes))
