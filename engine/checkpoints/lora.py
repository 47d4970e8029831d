"""Merging a LoRA file into a Wan transformer's weights, in place and for good: made for export.

A file's keys name modules and parts of changes (lora_names.py). Each module brings a change of some kind,
whole differences, or both (lora_kinds.py):

    weight += scale * alpha / rank * product          LoRA, LoHa, LoKr; DoRA scales the sum
    bias   += scale * alpha / rank * up_bias          lora_B.bias
    weight += scale * diff,  bias += scale * diff_b   modulation: diff_m
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial as bound
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import WeightsError
from .lazy_weights import stored_weights
from .lora_alphas import Alphas, read_alphas
from .lora_kinds import PRODUCTS, WHOLE, Change, Kind, Part
from .lora_names import about_images, modules, other_kind, read_key, takes_images
from .safetensors_io import load, some

PARTIAL = "--lora-partial merges the rest"


@dataclass(frozen=True)
class LoraReport:
    """What a merge did: the tensors that it changed, the ranks that occur (of LoRA pairs), and, of a partial
    one, the keys that were left out."""

    path: str
    scale: float
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        ranks = f", rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        rest = f"; {len(self.left_out)} keys are left out: {some(self.left_out)}" if self.left_out else ""
        return f"{self.path} at scale {self.scale:g}: {len(self.names)} tensors changed{ranks}{rest}"


@dataclass
class _Found:
    """A file's tensors by our module and part, and its other keys: of modules that are not here, and those
    that nothing is known of."""

    modules: dict[str, dict[str, Part]] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@torch.no_grad()
def merge_lora(
    transformer: nn.Module, path: str | Path, scale: float = 1.0, partial: bool = False
) -> LoraReport:
    """Adds `scale` times a LoRA to a transformer's weights, in place; their dtype and device stay.

    Args: transformer: a ConceptDiT, or any module with diffusers' names. path: a safetensors file. scale: any
        finite number; 0 changes no bit. partial: leave out what is for modules that the transformer does not
        have, as between text-to-video and image-to-video models, where at least something is for its own.
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
    found = _sort(path, tensors, modules(state))
    changes = list(_changes(path, found, state, read_alphas(path, metadata)))
    _check(path, changes, state, found, partial)
    if scale:  # adding zero would turn -0.0 into 0.0
        later = stored_weights(transformer)
        for change in changes:
            if change.target in later:
                later[change.target].changes.append(bound(change.add_to, scale=scale))
            else:
                change.add_to(state[change.target], scale)
    names = sorted({change.target for change in changes})
    ranks = sorted({change.rank for change in changes if change.rank is not None})
    return LoraReport(str(path), scale, tuple(names), tuple(ranks), tuple(sorted(found.elsewhere)))


def _sort(path: Path, tensors: Mapping[str, Tensor], ours: Mapping[str, str]) -> _Found:
    """What is where. Raises WeightsError for a kind that is not merged, and for what is there twice."""
    found = _Found()
    for key, tensor in tensors.items():
        if (kind := other_kind(key)) is not None:
            raise WeightsError(
                f"{path} is of the kind {kind} ({key}), which is not merged: LoRA, DoRA, LoHa and LoKr are"
            )
        name, part = read_key(key)
        if not part:
            found.unknown.append(key)
        elif name not in ours:
            found.elsewhere.append(key)
        else:
            parts = found.modules.setdefault(ours[name], {})
            if part in parts:
                raise WeightsError(f"{path} has the same thing twice: {parts[part].key} and {key}")
            parts[part] = Part(key, tensor)
    return found


def _changes(path: Path, found: _Found, state: Mapping[str, Tensor], alphas: Alphas) -> Iterator[Change]:
    """What each tensor of `state` gains; keys that turn out to have no tensor there are put into
    `found.elsewhere`, those that turn out to mean nothing into `found.unknown`."""
    for module, parts in found.modules.items():
        weight = f"{module}.weight" if f"{module}.weight" in state else module
        made = list(_of_module(path, weight, f"{module}.bias", parts, alphas))
        yield from (change for change in made if change.target in state)
        missing = (change for change in made if change.target not in state)
        found.elsewhere += [part.key for change in missing for part in change.parts.values()]
        used = {part.key for change in made for part in change.parts.values()}
        beside = ("alpha", "dora_scale", "magnitude") if len(used) else ()
        found.unknown += [
            part.key for name, part in parts.items() if part.key not in used and name not in beside
        ]


def _of_module(
    path: Path, weight: str, bias: str, parts: Mapping[str, Part], alphas: Alphas
) -> Iterator[Change]:
    """The changes that a module's parts make, of its weight and of its bias."""
    if "reshape_weight" in parts:
        wanted = tuple(parts["reshape_weight"].tensor.flatten().tolist()[:8])
        raise WeightsError(f"{path} is for a {weight} enlarged to {wanted}: such a LoRA is not merged")
    kinds = [kind for kind in PRODUCTS if kind.names & parts.keys()]
    lengths = parts.get("magnitude") or parts.get("dora_scale")
    if lengths is not None and (len(kinds) != 1 or {"diff", "up_bias"} & parts.keys()):
        raise WeightsError(f"{path} has {lengths.key}, which goes with one product and nothing else there")
    for kind in kinds:
        own = _form(path, kind, parts)
        factor = _factor(path, kind, own, parts.get("alpha"), alphas)
        yield Change(weight, kind, own, factor, lengths, "magnitude" in parts)
        if "up_bias" in parts and "up" in own:
            yield Change(bias, WHOLE, {"up_bias": parts["up_bias"]}, factor)
    if "diff" in parts:
        yield Change(weight, WHOLE, {"diff": parts["diff"]})
    if "diff_b" in parts:
        yield Change(bias, WHOLE, {"diff_b": parts["diff_b"]})


def _form(path: Path, kind: Kind, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts that are the kind's, in its order. Raises WeightsError unless they are one of its forms."""
    given = kind.names & parts.keys()
    for form in kind.forms:
        if given == set(form):
            return {name: parts[name] for name in form}
    half = " and ".join(parts[name].key for name in sorted(given))
    raise WeightsError(f"{path} has {half} without the other half of the pair, of the kind {kind.name}")


def _factor(path: Path, kind: Kind, parts: Mapping[str, Part], alpha: Part | None, alphas: Alphas) -> float:
    """What a product is multiplied with: its own alpha counts before the configuration's."""
    ranked = next((parts[name] for name in kind.ranked if name in parts), None)
    rank = None
    if ranked is not None:
        rank = ranked.tensor.shape[0] if ranked.tensor.ndim else 0
        if not rank:
            raise WeightsError(f"{path} has {ranked}, which must have rows")
    if alpha is None:
        return alphas.factor(read_key(next(iter(parts.values())).key)[0], rank)
    if alpha.tensor.numel() != 1:
        raise WeightsError(f"{path} has {alpha}, which must be one number")
    return 1.0 if rank is None else float(alpha.tensor) / rank  # LoKr of two whole factors has no rank


def _check(
    path: Path, changes: list[Change], state: Mapping[str, Tensor], found: _Found, partial: bool
) -> None:
    """Raises WeightsError for whatever must keep this file from being merged."""
    for change in changes:
        _check_channels(path, change, state[change.target].shape)
    images = [key for key in found.elsewhere if about_images(key)]
    if images and not takes_images(state) and not partial and changes:
        raise WeightsError(
            f"{path} is a LoRA of an image-to-video model, this transformer reads no pictures and has "
            f"nothing for {len(found.elsewhere)} of its keys: {some(images, 3)}; {PARTIAL}"
        )
    unused = sorted(found.unknown + ([] if partial and changes else found.elsewhere))
    if not changes:
        keys = f"its keys are {some(unused, 3)}" if unused else "it has no keys"
        ours = [key for key in state if key.endswith(".weight")]
        raise WeightsError(f"{path} matches nothing in the transformer: {keys}; ours are {some(ours, 3)}")
    misfits = [text for change in changes if (text := change.misfit(state[change.target].shape))]
    if misfits:
        raise WeightsError(f"{path} does not fit: {some(misfits, 3, 400)}")
    if unused:
        advice = "" if found.unknown else f"; {PARTIAL}"
        raise WeightsError(f"{path} has {len(unused)} keys that match nothing: {some(unused)}{advice}")
    for change in changes:
        for part in (*change.parts.values(), *([] if change.lengths is None else [change.lengths])):
            if not part.tensor.is_floating_point():
                raise WeightsError(f"{path} has whole numbers in {part.key}: quantised LoRAs are not read")
            if not part.tensor.float().isfinite().all():
                raise WeightsError(f"{path} has numbers in {part.key} that are not finite")
        if not math.isfinite(change.factor):
            raise WeightsError(f"{path} has an alpha for {change.target} that is not finite")


def _check_channels(path: Path, change: Change, shape: torch.Size) -> None:
    """Raises WeightsError where a file is for a transformer that takes another number of channels."""
    made = change.made()
    if change.target != "patch_embedding.weight" or made is None or made[:1] != shape[:1]:
        return
    channels, kernel = made[1:].numel(), shape[2:].numel()
    if channels % kernel == 0 and channels // kernel != shape[1]:
        raise WeightsError(
            f"{path} is for a transformer of {channels // kernel} input channels, this one has {shape[1]}: "
            f"such a LoRA is not merged, nor a part of it ({' and '.join(map(str, change.parts.values()))})"
        )
