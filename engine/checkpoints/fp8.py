"""Weights in 8 bits of floating point with a scale: read as their product, rounded to float16.

Three spellings, of the scale of `NAME.weight`: ComfyUI's first, `NAME.scale_weight`, in a file that an empty
tensor `scaled_fp8` marks (comfy/ops.py); LightX2V's and ComfyUI's of today, `NAME.weight_scale`, which the
latter marks layer by layer with JSON in `NAME.comfy_quant` (comfy/quant_ops.py). A scale is one number or one
for each row. Scales of activations (`scale_input`, `input_scale`) are for products in 8 bits, which are not
computed here. A plain cast to fp8 has no scales and needs nothing of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import WeightsError
from ...untrusted import parse_json
from .lazy_weights import Stored
from .safetensors_io import some

SCALES, UNREAD = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale")
MARKER, LAYER_MARKER = "scaled_fp8", ".comfy_quant"
FP8 = ("F8_E4M3", "F8_E5M2")
FORMATS = ("float8_e4m3fn", "float8_e5m2")
LARGEST_MARKER = 4096  # bytes


def in_16_bits(values: Tensor) -> Tensor:
    """float32 values in float16, rounded to the nearest; as they are where float16 does not reach."""
    narrow = values.to(torch.float16)
    return narrow if bool(narrow.isfinite().all()) else values


def descaled(tensors: Mapping[str, Stored], where: Path) -> dict[str, Stored]:
    """The tensors without scales and markers; weights that have a scale are multiplied with it when read.

    Raises: WeightsError, one line, for a scale without a weight in fp8, two of one weight, and in a file that
        has scales for a weight in fp8 without one.
    """
    scales: dict[str, str] = {}
    found, marked = dict[str, Stored](), False
    for name, tensor in tensors.items():
        scale = next((end for end in SCALES if name.endswith(end)), None)
        if scale is not None:
            weight = name.removesuffix(scale) + ".weight"
            if weight in scales:
                raise WeightsError(f"{where} has two scales of one weight: {some((scales[weight], name))}")
            scales[weight] = name
        elif name.endswith(LAYER_MARKER):
            _check_format(name, tensor, where)
            marked = True
        elif name == MARKER or name.endswith(f".{MARKER}"):
            marked = True
        elif not name.endswith(UNREAD):
            found[name] = tensor
    if not scales and not marked:
        return dict(tensors)
    eight = {name for name, tensor in found.items() if tensor.kind in FP8}
    lone = sorted(scales[name] for name in scales if name not in found)
    other = sorted(
        f"{name} ({found[name].kind})" for name in scales.keys() & found.keys() if name not in eight
    )
    bare = sorted(eight - scales.keys())
    wrong = sorted(
        f"{scales[name]} {tuple(tensors[scales[name]].shape)} for {tuple(found[name].shape)}"
        for name in scales.keys() & eight
        if not _fits(tensors[scales[name]], found[name].shape)
    )
    for names, problem in (
        (lone, "scales without a weight"),
        (other, "scales of weights that are not in fp8"),
        (bare, "weights in fp8 without a scale, in a file of scaled fp8"),
        (wrong, "scales that fit no weight"),
    ):
        if names:
            raise WeightsError(f"{where} has {len(names)} {problem}: {some(names)}")
    return {
        name: _product(tensor, tensors[scales[name]], where) if name in scales else tensor
        for name, tensor in found.items()
    }


def _product(weight: Stored, scale: Stored, where: Path) -> Stored:
    """A weight times its scale, in float16."""

    def multiplied(values: Tensor) -> Tensor:
        factor = scale.load().to(torch.float32)
        if not bool(factor.isfinite().all()):
            raise WeightsError(f"{where} has a scale that is not finite")
        rows = (-1, *(1 for _ in weight.shape[1:])) if factor.numel() > 1 else ()  # one for each row, or all
        return in_16_bits(values.to(torch.float32) * factor.view(rows))

    return weight.then(multiplied, weight.shape, "F16")


def _fits(scale: Stored, shape: torch.Size) -> bool:
    rows = len(shape) > 1 and scale.shape in (shape[:1], (shape[0], *(1 for _ in shape[1:])))
    return scale.is_floating_point() and (scale.shape.numel() == 1 or rows)


def _check_format(name: str, tensor: Stored, where: Path) -> None:
    """Raises WeightsError for a layer's marker that tells of another format than fp8."""
    try:
        if tensor.shape.numel() > LARGEST_MARKER or tensor.kind != "U8":
            raise ValueError("is no short text")
        values = parse_json(bytes(tensor.load().flatten().tolist()))
        kind = values.get("format") if isinstance(values, dict) else None
    except ValueError as error:
        raise WeightsError(f"{where}: {name} {error}") from error
    if kind not in FORMATS:
        raise WeightsError(f"{where}: {name} tells of {kind!r:.60}, read are {', '.join(FORMATS)}")
