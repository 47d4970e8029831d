"""What the torch backend may be told. Importing this loads no torch."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ....errors import InputError

DTYPES = ("float32", "bfloat16")
VAE_DTYPES = (*DTYPES, "float16")
TIERS = ("lossless", "high")
ATTENTIONS = ("pytorch", "pytorch-heads-first", "flash-attention-3")
"""Ways to compute self-attention on CUDA: WAYS of kernels/self_attention.py."""


LORAS = ("lora", "lora_scale", "lora_2", "lora_2_scale")
"""Options that are tuples: files, and their scales."""
PARTS = {
    "transformer": "the transformer, of two the high-noise expert",
    "transformer_2": "the low-noise expert",
    "text_encoder": "UMT5",
    "vae": "the VAE",
    "image_encoder": "CLIP",
}
"""The parts of a base that a file of their own may hold, by their names there."""


@dataclass(frozen=True)
class TorchOptions:
    """Options of the torch backend; what makes videos differ from those of the other backends is off.

    weights: what the bundle was exported from, a folder or a model of the Hugging Face Hub; None looks for it
    (see weights.py). transformer to image_encoder: single files that it was exported with. adapter, lora: for
    a base, trained concept modules and the LoRAs that are merged, where the bundle does not find what it
    records; lora_scale: of each LoRA, in their order, () where they are recorded or 1; lora_2, lora_2_scale:
    those of the low-noise expert of two; lora_partial: leave out what the base has no modules for. dtype: of
    transformer and encoders; None is float32 on the CPU, bfloat16 on CUDA. attention: how self-attention is
    computed on CUDA, one of ATTENTIONS; None measures, and takes the fastest.

    Lossy, with measured errors in docs/performance.md: vae_dtype (of Wan's video autoencoder; in float16 a
    value beyond 65,504 ends the request with an error), tier "high" (linear layers in 8 bits, on GPUs that
    have fp8), skip_guidance (so large a part of the steps, at the end, is not guided), step_cache (steps
    whose predicted change stays below it, in parts of the velocity, are not computed, see stepper.py).

    Raises: InputError for a value that is out of range.
    """

    weights: str | os.PathLike[str] | None = None
    transformer: str | os.PathLike[str] | None = None
    transformer_2: str | os.PathLike[str] | None = None
    text_encoder: str | os.PathLike[str] | None = None
    vae: str | os.PathLike[str] | None = None
    image_encoder: str | os.PathLike[str] | None = None
    adapter: str | os.PathLike[str] | None = None
    lora: tuple[str | os.PathLike[str], ...] = ()
    lora_scale: tuple[float, ...] = ()
    lora_2: tuple[str | os.PathLike[str], ...] = ()
    lora_2_scale: tuple[float, ...] = ()
    lora_partial: bool = False
    dtype: str | None = None
    attention: str | None = None
    vae_dtype: str = "float32"
    tier: str = "lossless"
    skip_guidance: float = 0.0
    step_cache: float = 0.0

    def __post_init__(self) -> None:
        choices_of: dict[str, tuple[str | None, ...]] = {
            "dtype": (*DTYPES, None),
            "vae_dtype": VAE_DTYPES,
            "attention": (*ATTENTIONS, None),
            "tier": TIERS,
        }
        for name, known in choices_of.items():
            value = getattr(self, name)
            if value not in known:
                choices = ", ".join(choice for choice in known if choice)
                raise InputError(f"unknown {name} {value!r}: choose one of {choices}")
        if not all(isinstance(getattr(self, name), tuple) for name in LORAS):
            raise InputError("lora and lora_scale must be tuples: an entry for each LoRA, in their order")
        for name in ("skip_guidance", "step_cache"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not 0 <= value <= 1:
                raise InputError(f"{name} must be a number from 0 to 1, not {value!r}")

    def from_here(self) -> TorchOptions:
        """These, with files that are found whatever the current folder will be; a model of the Hub stays."""
        weights = self.weights
        if weights is not None and os.path.exists(weights):
            weights = os.path.join(os.getcwd(), weights)
        single = {name: getattr(self, name) for name in ("adapter", *PARTS)}
        given: dict[str, Any] = {
            name: os.path.join(os.getcwd(), file) for name, file in single.items() if file is not None
        }
        for name in LORAS[::2]:
            given[name] = tuple(os.path.join(os.getcwd(), file) for file in getattr(self, name))
        return replace(self, weights=weights, **given)

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> TorchOptions:
        """Those that `to_plain` gave."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    @property
    def parts(self) -> dict[str, Path]:
        """The files of single parts that are given, by the names of PARTS."""
        return {name: Path(file) for name in PARTS if (file := getattr(self, name)) is not None}

    @property
    def lossy(self) -> list[str]:
        """The lossy options that are on, as they are written on the command line."""
        found = [f"--vae-dtype {self.vae_dtype}"] if self.vae_dtype != "float32" else []
        found += [f"--tier {self.tier}"] if self.tier != "lossless" else []
        for name in ("skip_guidance", "step_cache"):
            if value := getattr(self, name):
                found.append(f"--{name.replace('_', '-')} {value:g}")
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
