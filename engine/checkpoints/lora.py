"""Merging a LoRA file into a Wan2.1 transformer's weights, in place and for good: made for export.

A file's keys name modules as diffusers does (`blocks.0.attn1.to_q`), as Wan2.1's own code does
(`blocks.0.self_attn.q`) or as kohya's scripts do (`lora_unet_blocks_0_self_attn_q`). Each module brings a
low-rank pair, a whole difference, or both:

    weight += scale * alpha / rank * up @ down        lora_up | lora_B, lora_down | lora_A, alpha
    bias   += scale * alpha / rank * up_bias          lora_B.bias
    weight += scale * diff,  bias += scale * diff_b   modulation: diff_m

Letters: r rank, o and i a weight's rows and the size of each of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import WeightsError
from ...untrusted import parse_json, read_json
from ..checked import is_number
from .lazy_weights import stored_weights
from .safetensors_io import load, some
from .wan_names import wan_name

# Parts of names that in Wan2.1 mean an image-to-video model. Over a text-to-video base a ConceptDiT may have
# add_k_proj, add_v_proj and norm_added_k too, for its concepts: an image-to-video LoRA must not land there.
_IMAGE = ("add_k_proj", "add_v_proj", "norm_added_k", "image_embedder", "k_img", "v_img", "img_emb")

_PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "lora_unet_")
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora_up.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_B.default.bias": "up_bias",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
}


_NAME, _NUMBERS = re.compile(r"[A-Za-z0-9_-]+"), (r"\d+", r"\d", "[0-9]+", "[0-9]")
LARGEST_CONFIG, MOST_PATTERNS = 2**20, 4096  # bytes; entries of alpha_pattern


@dataclass(frozen=True)
class LoraReport:
    """What a merge did: the tensors that it changed, the ranks that occur (none for whole differences)."""

    path: str
    scale: float
    names: tuple[str, ...]
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        ranks = f", rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        return f"{self.path} at scale {self.scale:g}: {len(self.names)} tensors changed{ranks}"


class _Part(NamedTuple):
    """One tensor of the file, and the key that it has there."""

    key: str
    tensor: Tensor


class _Pattern(NamedTuple):
    """The end of a module's name, part by part; None is any number."""

    parts: tuple[str | None, ...]

    @classmethod
    def read(cls, text: str) -> _Pattern:
        """Of a key of PEFT's configuration. To PEFT it is any regular expression, of which there are some
        that never end: here, names and numbers. Raises ValueError for anything else."""
        parts = re.split(r"\\?\.", text)
        if len(text) > 200 or not all(part in _NUMBERS or _NAME.fullmatch(part) for part in parts):
            raise ValueError(f"{text!r:.80} is no module's name (in a pattern, only \\d+ is read)")
        return cls(tuple(None if part in _NUMBERS else part for part in parts))

    def ends(self, name: list[str]) -> bool:
        """Whether the parts of a module's name end like this."""
        end = name[-len(self.parts) :]
        return len(end) == len(self.parts) and all(
            there.isdecimal() if part is None else there == part
            for part, there in zip(self.parts, end, strict=True)
        )


class _Alphas(NamedTuple):
    """What PEFT's configuration says of alpha; `default` None: nothing, then alpha is the rank."""

    default: float | None = None
    patterns: tuple[tuple[_Pattern, float], ...] = ()
    by_root: bool = False  # rsLoRA: alpha / sqrt(rank)

    def factor(self, name: str, rank: int) -> float:
        """What the product of a module's pair is multiplied with; `name` as in the file."""
        parts = name.split(".")
        alpha = next((alpha for pattern, alpha in self.patterns if pattern.ends(parts)), self.default)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.by_root else rank)


class _Delta(NamedTuple):
    """What one of the transformer's tensors gains: factor * up @ down, or factor * up without `down`."""

    target: str
    factor: float
    up: _Part  # [o,r] or [o,r,1,1,1]; without `down` as the target
    down: _Part | None = None  # [r,i], or [r,…] with the target's other axes

    def misfit(self, shape: torch.Size) -> str | None:
        """None, or in words how this does not fit a target of that shape."""
        if self.down is None:
            fits = self.up.tensor.shape == shape
            return None if fits else f"{self.target} is {tuple(shape)}, {_described(self.up)}"
        up, down = self.up.tensor, self.down.tensor
        fits = min(len(shape), up.ndim, down.ndim) > 1
        fits = fits and up.flatten(1).shape == (shape[0], down.shape[0])
        fits = fits and down.flatten(1).shape[1] == shape[1:].numel()
        fits = fits and down.shape[0] <= max(shape[0], shape[1:].numel(), 1024)  # else it is no low rank
        return None if fits else f"{self.target} is {tuple(shape)}, {_described(self.up, self.down)}"

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Adds scale times this to `weight`, in float32 at least; rounded once, to the weight's dtype."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = self.up.tensor.to(weight.device, wide)
        if self.down is not None:
            down = self.down.tensor.to(weight.device, wide)
            change = change.flatten(1) @ down.flatten(1)  # [o,i]
        weight.copy_(weight.to(wide) + scale * self.factor * change.view(weight.shape))


@torch.no_grad()
def merge_lora(transformer: nn.Module, path: str | Path, scale: float = 1.0) -> LoraReport:
    """Adds `scale` times a LoRA to a transformer's weights, in place; their dtype and device stay.

    Args: transformer: a ConceptDiT, or any module with diffusers' names. path: a safetensors file. scale: any
        finite number; 0 changes no bit.
    A pair without an alpha has alpha = rank. Alphas are read from the file's `.alpha` tensors, from the
    metadata that diffusers writes, or, for PEFT's `adapter_model.safetensors`, from the
    `adapter_config.json` beside it. Weights on disk (lazy_weights.py) are changed whenever they are read.
    Raises: FileNotFoundError, or WeightsError, one line, for a file that cannot be read, does not fit, or
        holds numbers that are not finite. Then no weight has changed.
    """
    path = Path(path)
    if not math.isfinite(scale):
        raise WeightsError(f"the scale of a LoRA must be a finite number, got {scale}")
    tensors, metadata = load(path)
    state = transformer.state_dict()
    layers, unused = _sort(path, tensors, _modules(state))
    deltas = _deltas(path, layers, state, unused, _read_alphas(path, metadata))
    _check(path, deltas, state, unused)
    if scale:  # adding zero would turn -0.0 into 0.0
        later = stored_weights(transformer)
        for delta in deltas:
            if delta.target in later:
                later[delta.target].changes.append(partial(delta.add_to, scale=scale))
            else:
                delta.add_to(state[delta.target], scale)
    names = sorted({delta.target for delta in deltas})
    ranks = sorted({delta.down.tensor.shape[0] for delta in deltas if delta.down is not None})
    return LoraReport(str(path), scale, tuple(names), tuple(ranks))


def _modules(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every spelling of every module that a LoRA may change, to the module's name in `state`."""
    keys = [key for key in state if _takes_images(state) or not _about_images(key)]
    own = {key.removesuffix(".weight").removesuffix(".bias") for key in keys}
    dotted = {wan_name(module): module for module in own} | {module: module for module in own}
    return {name.replace(".", "_"): module for name, module in dotted.items()} | dotted


def _split(key: str) -> tuple[str, str]:
    """A file's key -> the module without its prefixes, and which part of it the tensor is ("" if unknown)."""
    name = key
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name.endswith(".diff_m"):
        return name.removesuffix("diff_m") + "modulation", "diff"
    for ending, part in _ENDINGS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), part
    return name, ""


def _sort(
    path: Path, tensors: Mapping[str, Tensor], modules: Mapping[str, str]
) -> tuple[dict[str, dict[str, _Part]], list[str]]:
    """The file's tensors by our module and part, and the keys that match nothing."""
    layers: dict[str, dict[str, _Part]] = {}
    unused = []
    for key, tensor in tensors.items():
        name, part = _split(key)
        if not part or name not in modules:
            unused.append(key)
            continue
        parts = layers.setdefault(modules[name], {})
        if part in parts:
            raise WeightsError(f"{path} has the same thing twice: {parts[part].key} and {key}")
        parts[part] = _Part(key, tensor)
    return layers, unused


def _deltas(
    path: Path,
    layers: Mapping[str, dict[str, _Part]],
    state: Mapping[str, Tensor],
    unused: list[str],
    alphas: _Alphas,
) -> list[_Delta]:
    """What each tensor of `state` gains; keys that turn out to have no tensor there are put into `unused`."""
    found = []
    for module, parts in layers.items():
        weight = f"{module}.weight" if f"{module}.weight" in state else module
        if ("up" in parts) != ("down" in parts):
            half = parts.get("up") or parts["down"]
            raise WeightsError(f"{path} has {half.key} without the other half of the pair")
        if "up" in parts:
            factor = _factor(path, parts, alphas)
            found.append(_Delta(weight, factor, parts["up"], parts["down"]))
            if "up_bias" in parts:
                found.append(_Delta(f"{module}.bias", factor, parts["up_bias"]))
        else:
            unused += [parts[part].key for part in ("alpha", "up_bias") if part in parts]
        if "diff" in parts:
            found.append(_Delta(weight, 1.0, parts["diff"]))
        if "diff_b" in parts:
            found.append(_Delta(f"{module}.bias", 1.0, parts["diff_b"]))
    unused += [delta.up.key for delta in found if delta.target not in state]
    return [delta for delta in found if delta.target in state]


def _factor(path: Path, parts: Mapping[str, _Part], alphas: _Alphas) -> float:
    """What a pair's product is multiplied with: its own alpha counts before the configuration's."""
    down = parts["down"]
    rank = down.tensor.shape[0] if down.tensor.ndim else 0
    if not rank:
        raise WeightsError(f"{path} has {_described(down)}, which must have rows")
    if "alpha" not in parts:
        return alphas.factor(_split(down.key)[0], rank)
    if parts["alpha"].tensor.numel() != 1:
        raise WeightsError(f"{path} has {_described(parts['alpha'])}, which must be one number")
    return float(parts["alpha"].tensor) / rank


def _read_alphas(path: Path, metadata: Mapping[str, str]) -> _Alphas:
    """Alphas that are not in tensors: diffusers puts them into the metadata, PEFT into a file beside."""
    source, text = f"the metadata of {path}", metadata.get("lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    if text is None and path.name == "adapter_model.safetensors" and beside.is_file():
        source, text = str(beside), None
    elif text is None:
        return _Alphas()
    try:
        values = parse_json(text) if text is not None else read_json(beside, LARGEST_CONFIG)
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        # A pipeline's file has every component's configuration, each under the component's name.
        config = {key.removeprefix("transformer."): value for key, value in values.items()}
        patterns = config.get("alpha_pattern") or {}
        default = config.get("lora_alpha")
        if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
            raise ValueError(f"alpha_pattern must be an object of at most {MOST_PATTERNS} entries")
        if not all(map(is_number, [*patterns.values(), config.get("lora_alpha", 0)])):
            raise ValueError("an alpha must be a finite number")
        found = tuple((_Pattern.read(key), float(alpha)) for key, alpha in patterns.items())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{source} has no usable LoRA configuration: {error}") from error
    return _Alphas(None if default is None else float(default), found, bool(config.get("use_rslora")))


def _check(path: Path, deltas: list[_Delta], state: Mapping[str, Tensor], unused: list[str]) -> None:
    """Raises WeightsError for whatever must keep this file from being merged."""
    images = [key for key in unused if _about_images(key)]
    if images and not _takes_images(state):
        raise WeightsError(
            f"{path} is a LoRA of an image-to-video model, this transformer is text-to-video; it has nothing "
            f"for {some(images)}"
        )
    if not deltas:
        keys = f"its keys are {some(unused, 3)}" if unused else "it has no keys"
        ours = [key for key in state if key.endswith(".weight")]
        raise WeightsError(f"{path} matches nothing in the transformer: {keys}; ours are {some(ours, 3)}")
    misfits = [text for delta in deltas if (text := delta.misfit(state[delta.target].shape))]
    if misfits:
        raise WeightsError(f"{path} does not fit: {some(misfits, 4)}")
    if unused:
        raise WeightsError(f"{path} has {len(unused)} keys that match nothing: {some(sorted(unused), 40)}")
    for delta in deltas:
        for part in (delta.up, delta.down):
            if part is not None and not part.tensor.is_floating_point():
                raise WeightsError(f"{path} has whole numbers in {part.key}: quantised LoRAs are not read")
            if part is not None and not part.tensor.float().isfinite().all():
                raise WeightsError(f"{path} has numbers in {part.key} that are not finite")
        if not math.isfinite(delta.factor):
            raise WeightsError(f"{path} has an alpha for {delta.target} that is not finite")


def _takes_images(state: Mapping[str, Tensor]) -> bool:
    """Whether this is an image-to-video model."""
    return any("image_embedder" in key for key in state)


def _about_images(key: str) -> bool:
    return any(part in key for part in _IMAGE)


def _described(*parts: _Part) -> str:
    return " and ".join(f"{part.key} {tuple(part.tensor.shape)}" for part in parts)
