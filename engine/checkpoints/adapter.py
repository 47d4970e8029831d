"""The concept part of a model as a file of its own, which any base of the same width can take.

It holds Q-Former, label binding and what the transformer has beyond Wan's, under their names in
ConceptMaster. Its metadata say what it must be built as (ConceptConfig) and on what (AdapterBase).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import ConfigError, WeightsError
from ...untrusted import parse_json
from ..checked import check_types
from ..concept_config import ConceptConfig
from ..config import ModelConfig
from ..model import ConceptMaster
from .safetensors_io import check_strict, load, load_strict, on_meta, save

FORMAT = "conceptmaster adapter 1"
EXPERTS = ("transformer", "transformer_2")


@dataclass(frozen=True)
class AdapterBase:
    """What of a base an adapter's tensors depend on: the transformer's width, heads, layers, text width."""

    width: int
    heads: int
    layers: int
    text_dim: int

    @classmethod
    def of(cls, config: ModelConfig) -> AdapterBase:
        """Of a model's configuration."""
        t = config.transformer
        return cls(t.width, t.num_attention_heads, t.num_layers, t.text_dim)


@dataclass(frozen=True)
class Adapter:
    """A file's contents: how the concept part is built, the base that it is for, and its tensors."""

    path: Path
    concept: ConceptConfig
    base: AdapterBase
    tensors: Mapping[str, Tensor]


def adapter_keys(model: ConceptMaster) -> set[str]:
    """The names in `model`'s state dict that are the adapter's, not the base's."""
    experts = model.experts().items()
    concept = {f"{name}.{key}" for name, transformer in experts for key in transformer.concept_keys()}
    return concept | {key for key in model.state_dict() if key.startswith(("qformer.", "dam."))}


def save_adapter(model: ConceptMaster, path: str | Path) -> None:
    """Writes the adapter of `model`. Raises WeightsError where it has none."""
    keys = adapter_keys(model)
    if not keys:
        raise WeightsError(f"the model {model.config.name!r} has no adapter: it takes no concepts")
    told = model.config.concept.told()
    metadata = {
        "format": FORMAT,
        "concept": json.dumps(told),
        "base": json.dumps(dataclasses.asdict(AdapterBase.of(model.config))),
    }
    save(path, {name: value for name, value in model.state_dict().items() if name in keys}, metadata)


def read_adapter(path: str | Path) -> Adapter:
    """Reads what `save_adapter` wrote. Raises FileNotFoundError, or WeightsError for any other file."""
    path = Path(path)
    tensors, metadata = load(path)
    if (found := metadata.get("format")) != FORMAT:
        raise WeightsError(f"{path} is no adapter: its format is {found!r:.80}, not {FORMAT!r}")
    try:
        concept = _entry(ConceptConfig, metadata, "concept")
        base = _entry(AdapterBase, metadata, "base")
    except (ValueError, TypeError) as error:  # ConfigError and JSON's errors are ValueErrors
        raise WeightsError(f"{path} has unusable metadata: {error}") from error
    if concept.injection == "none":
        raise WeightsError(f"{path} has unusable metadata: an adapter's injection is not 'none'")
    return Adapter(path, concept, base, tensors)


def load_adapter(model: ConceptMaster, adapter: Adapter | str | Path) -> None:
    """Replaces the concept part of `model` by an adapter, in the model's dtype and on its device.

    Raises: WeightsError, one line, where the adapter is for another base than `model` or built otherwise than
        its configuration says; FileNotFoundError. `model` is then as it was.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter)
    check_base(adapter, model.config)
    differing = _differences(adapter.concept, model.config.concept)
    if differing:
        raise WeightsError(f"{adapter.path} has other concept modules than the model: {differing}")
    own = adapter_keys(model)
    try:
        load_strict(model, adapter.tensors, absent=set(model.state_dict()) - own)
    except WeightsError as error:
        raise WeightsError(f"{adapter.path}: {error}") from error


def check_base(adapter: Adapter, config: ModelConfig) -> None:
    """Raises WeightsError, one line, unless the adapter is for a base like that of `config`, and has the
    tensors that it says."""
    if differing := _differences(adapter.base, AdapterBase.of(config)):
        raise WeightsError(f"{adapter.path} is an adapter for another base than {config.name}: {differing}")
    if adapter.concept == config.concept:  # then it is this that is built, at its full size
        model = on_meta(ConceptMaster, config, adapter.path)
        _check_experts(adapter, model)
        try:
            check_strict(model, adapter.tensors, set(model.state_dict()) - adapter_keys(model))
        except WeightsError as error:
            raise WeightsError(f"{adapter.path}: {error}") from error


def _check_experts(adapter: Adapter, model: ConceptMaster) -> None:
    """Raises WeightsError for an adapter of one transformer where there are two experts, or the other way."""
    for name in EXPERTS:
        has = any(key.startswith(f"{name}.") for key in adapter.tensors)
        if has != (name in model.experts()):
            what = f"modules for {name}, which the base does not have" if has else f"no modules for {name}"
            raise WeightsError(f"{adapter.path} has {what}: an adapter has them for each of a base's experts")


def _differences(theirs: Any, ours: Any) -> str:
    """The fields in which two dataclasses of a kind differ, in words."""
    names = [field.name for field in dataclasses.fields(ours)]
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in names]
    return ", ".join(f"its {name} is {a}, not {b}" for name, a, b in pairs if a != b)


def _entry(kind: Any, metadata: dict[str, str], name: str) -> Any:
    values = parse_json(metadata.get(name, "null"))
    if not isinstance(values, dict):
        raise ConfigError(f"no object {name!r}")
    found = kind(**values)
    check_types(found)
    return found
