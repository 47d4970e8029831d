"""Holds the fields of a configuration to their types and to plain upper bounds: they may come from any file.

The bounds lie far beyond every model there is. They keep what is built before the weights are looked at, and
what is computed from sizes alone, small and quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import ConfigError

WIDEST = 2**16  # of what is not listed below
DEEPEST = 256  # layers
MOST = {
    "ffn_dim": 2**18,
    "d_ff": 2**18,
    "intermediate_size": 2**18,
    "vocab_size": 2**21,
    "rope_max_seq_len": 2**20,
    "pos_embed_seq_len": 2**20,
    "num_attention_heads": 1024,
    "num_heads": 1024,
    "heads": 1024,
    "attention_head_dim": 4096,
    "num_layers": DEEPEST,
    "num_hidden_layers": DEEPEST,
    "layers": DEEPEST,
    "num_res_blocks": 16,
    "max_concepts": 64,
    "picture_size": 4096,
    "image_size": 4096,
    "height": 2**14,
    "width": 2**14,
    "fps": 1000,
    "base_dim": 4096,
    "z_dim": 4096,
    "position_channels": 192,
    "scale_factor_temporal": 64,
    "scale_factor_spatial": 256,
    "fold": 256,
}
"""The largest value of a field or an entry, by its name."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def is_whole(value: Any, most: int = WIDEST, least: int = 1) -> bool:
    """Whether this is an int, and no bool, of at least `least` and at most `most`."""
    return type(value) is int and least <= value <= most


def is_number(value: Any, most: float = 1e30) -> bool:
    """Whether this is an int or a float, no bool, finite and of magnitude `most` at most."""
    return type(value) in (int, float) and -most <= value <= most


class _Kind(NamedTuple):
    what: str
    holds: Callable[[Any], bool]


_KINDS = {
    "int": _Kind("a whole number", lambda value: type(value) is int),
    "float": _Kind("a number", is_number),
    "str": _Kind("a short text", lambda value: isinstance(value, str) and len(value) <= 10_000),
    "bool": _Kind("true or false", lambda value: isinstance(value, bool)),
}


def check_types(owner: Any) -> None:
    """Raises ConfigError for a field of a dataclass that is annotated `int`, `float`, `str` or `bool`, or one
    of these `| None`, and holds something else; whole numbers where a float may be are fine."""
    for field in dataclasses.fields(owner):
        name, _, optional = str(field.type).partition(" | ")
        kind = _KINDS.get(name)
        value = getattr(owner, field.name, None)
        if kind is None or (value is None and optional):
            continue
        require(
            kind.holds(value),
            f"{type(owner).__name__}.{field.name} must be {kind.what}, got {value!r:.60}",
        )


def check_positive(owner: Any, *names: str) -> None:
    """Raises ConfigError unless these fields are whole numbers from 1 to their largest."""
    for name in names:
        value, most = getattr(owner, name), MOST.get(name, WIDEST)
        require(
            is_whole(value, most),
            f"{type(owner).__name__}.{name} must be a positive whole number of at most {most}, got "
            f"{value!r:.60}",
        )


def check_choice(owner: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError unless this field is one of `choices`."""
    value = getattr(owner, name)
    require(
        value in choices,
        f"{type(owner).__name__}.{name} must be one of {', '.join(choices)}, got {value!r:.60}",
    )


def _list_of(holds: Callable[[Any], bool], least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, (list, tuple)) and least <= len(value) <= most and all(map(holds, value))
    )


_SIZE = "a size"
_LAYER_NAMES = _Kind("the name of a function", lambda value: isinstance(value, str) and len(value) <= 40)
_NUMBERS = _Kind("a list of numbers", _list_of(is_number, 0, WIDEST))
_SMALL_SIZES = _Kind("a list of 1 to 8 small sizes", _list_of(lambda size: is_whole(size, 64), 1, 8))
_FLAGS = _Kind("a list of at most 8 times true or false", _list_of(_KINDS["bool"].holds, 0, 8))
_FRACTION = _Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
_OPTIONAL_SIZE = _Kind("a size or null", lambda value: value is None or is_whole(value))

# What transformers' and diffusers' classes are given. Nothing else: they take any name, and some make them
# load code.
ENTRIES: dict[str, dict[str, str | _Kind]] = {
    "text_encoder": dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"), _SIZE)
    | dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), _SIZE)
    | {"feed_forward_proj": _LAYER_NAMES, "dropout_rate": _FRACTION, "layer_norm_epsilon": _FRACTION},
    "image_encoder": dict.fromkeys(
        ("hidden_size", "intermediate_size", "projection_dim", "image_size", "patch_size"), _SIZE
    )
    | dict.fromkeys(("num_hidden_layers", "num_attention_heads"), _SIZE)
    | {"hidden_act": _LAYER_NAMES, "layer_norm_eps": _FRACTION},
    "vae of Wan's": dict.fromkeys(
        ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels"), _SIZE
    )
    | dict.fromkeys(("scale_factor_temporal", "scale_factor_spatial"), _SIZE)
    | dict.fromkeys(("decoder_base_dim", "patch_size"), _OPTIONAL_SIZE)
    | dict.fromkeys(("attn_scales", "latents_mean", "latents_std"), _NUMBERS)
    | {
        "kind": _KINDS["str"],
        "dim_mult": _SMALL_SIZES,
        "temperal_downsample": _FLAGS,
        "dropout": _FRACTION,
        "is_residual": _KINDS["bool"],
    },
    "vae of blocks": dict.fromkeys(("z_dim", "width", "layers", "fold"), _SIZE)
    | dict.fromkeys(("scale_factor_temporal", "scale_factor_spatial"), _SIZE)
    | {"kind": _KINDS["str"], "latents_mean": _NUMBERS, "latents_std": _NUMBERS},
}
"""The entries that each part may have, by its kind."""


def check_entries(kind: str, values: Mapping[str, Any]) -> None:
    """Raises ConfigError for an entry that ENTRIES does not have for this kind, or of another type."""
    require(isinstance(values, Mapping), f"the {kind} must be an object, got {values!r:.60}")
    for name, value in values.items():
        require(name in ENTRIES[kind], f"the {kind} has no entry {name!r:.60}")
        known = ENTRIES[kind][name]
        most = MOST.get(name, WIDEST)
        what = f"a positive whole number of at most {most}" if isinstance(known, str) else known.what
        holds = is_whole(value, most) if isinstance(known, str) else known.holds(value)
        require(holds, f"{kind}[{name!r}] must be {what}, got {value!r:.60}")
