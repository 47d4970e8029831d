"""What a LoRA's product is multiplied with, where its file's tensors do not say: PEFT's configuration.

diffusers puts it into the metadata of its file, PEFT into an adapter_config.json beside its
adapter_model.safetensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import WeightsError
from ...untrusted import parse_json, read_json
from ..checked import is_number

LARGEST_CONFIG, MOST_PATTERNS = 2**20, 4096  # bytes; entries of a table of patterns
_NAME, _NUMBERS = re.compile(r"[A-Za-z0-9_-]+"), (r"\d+", r"\d", "[0-9]+", "[0-9]")
_KINDS = ("LORA", "LOHA", "LOKR")  # PEFT's names of those that are merged
# Ways to begin with which PEFT changes the base's weights, too: a change of those alone is only half of it.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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


class _Numbers(NamedTuple):
    """One number for all modules, None for nothing said, but for those whose names end like a pattern."""

    default: float | None = None
    patterns: tuple[tuple[_Pattern, float], ...] = ()

    @classmethod
    def read(cls, default: Any, patterns: Any, name: str) -> _Numbers:
        """Of the entry `name` and of its patterns. Raises ValueError."""
        patterns = patterns or {}
        if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
            raise ValueError(f"{name}_pattern must be an object of at most {MOST_PATTERNS} entries")
        if not all(map(is_number, [*patterns.values(), 0 if default is None else default])):
            raise ValueError(f"every {name} must be a finite number")
        found = tuple((_Pattern.read(key), float(value)) for key, value in patterns.items())
        return cls(None if default is None else float(default), found)

    def of(self, module: str) -> float | None:
        """A module's number."""
        parts = module.split(".")
        return next((number for pattern, number in self.patterns if pattern.ends(parts)), self.default)


class Alphas(NamedTuple):
    """Of PEFT's configuration what decides the factor; nothing said: alpha is the rank."""

    alphas: _Numbers = _Numbers()
    ranks: _Numbers = _Numbers()
    by_root: bool = False  # rsLoRA: alpha / sqrt(rank)

    def factor(self, module: str, rank: int | None) -> float:
        """What a module's product is multiplied with; `module` as in the file, rank None of a product whose
        tensors do not show one."""
        alpha, divisor = self.alphas.of(module), self.ranks.of(module) if rank is None else rank
        if alpha is None or not divisor:
            return 1.0
        return alpha / (math.sqrt(divisor) if self.by_root else divisor)


def read_alphas(path: Path, metadata: Mapping[str, str]) -> Alphas:
    """The configuration of the LoRA at `path`, none where there is none. Raises WeightsError."""
    source, text = f"the metadata of {path}", metadata.get("lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    if text is None:
        if path.name != "adapter_model.safetensors" or not beside.is_file():
            return Alphas()
        source = str(beside)
    try:
        values = parse_json(text) if text is not None else read_json(beside, LARGEST_CONFIG)
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        # A pipeline's file has every component's configuration, each under the component's name.
        config = {key.removeprefix("transformer."): value for key, value in values.items()}
        if (kind := config.get("peft_type")) not in (None, *_KINDS):
            raise ValueError(f"it is of the kind {kind!r:.40}, of which nothing is merged")
        begun = str(config.get("init_lora_weights")).lower()
        if begun.startswith(_CHANGE_THE_BASE):
            raise ValueError(f"init_lora_weights {begun!r:.40} changes the base as well, save it converted")
        alpha = config.get("lora_alpha", config.get("alpha"))  # of LoRA; of LoHa and LoKr
        if alpha is None and "lora_alpha" in config:
            raise ValueError("lora_alpha must be a number")
        return Alphas(
            _Numbers.read(alpha, config.get("alpha_pattern"), "alpha"),
            _Numbers.read(config.get("r"), config.get("rank_pattern"), "rank"),
            bool(config.get("use_rslora")),
        )
    except (OSError, ValueError) as error:
        raise WeightsError(f"{source} has no usable LoRA configuration: {error}") from error
