"""Bernini-R: a Wan of text alone, unchanged, that was trained to read references as tokens of their own.

Its folder is diffusers' layout with a config.json at its root, which its loader (bernini/pipeline.py,
models/renderer.py) reads: nothing else tells it from Wan2.1-1.3B, or, with two experts, from Wan2.2-A14B.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..checked import MOST, is_number, is_whole
from ..concept_config import PATCH, ConceptConfig
from .base import Base
from .derived import VACE_CLASS

ROOT = "config.json"
RENDERER = "bernini_renderer"
SIDE = 848
"""Pixels: what the longer side of a reference is at most, as its command line has it (max_image_size)."""
REFERENCES = 4
"""How many a bundle takes at most where nothing is said."""
SKIPPED = "skip_transformer_2"

# What its loader takes where the file leaves it out, and what the engine has.
_WANTED = {
    "skip_transformer_1": False,
    "max_sequence_length": 512,
    "use_unipc": True,
    "use_src_id_rotary_emb": True,
    "interpolate_src_id": True,
    "max_trained_src_id": 5,
}


def is_bernini(root: Mapping[str, Any]) -> bool:
    """Whether the config.json at a folder's root is that of Bernini-R."""
    return root.get("model_type") == RENDERER


def check_root(path: Path, root: Mapping[str, Any]) -> None:
    """Raises ConfigError for a folder of another kind than Bernini-R or plain diffusers, as the config.json
    at its root says, and for a Bernini-R that the engine cannot honour."""
    kind, classes = root.get("model_type"), root.get("architectures")
    if not is_bernini(root):
        if isinstance(kind, str) and (classes is not None or kind.startswith("bernini")):
            why = ": of Bernini it has the renderer alone, Bernini-R" if kind.startswith("bernini") else ""
            raise ConfigError(f"{path}: the model is a {kind!r:.80}, which the engine does not have{why}")
        return
    for name, value in _WANTED.items():
        if (found := root.get(name, value)) != value:
            raise ConfigError(f"{path}: {name} must be {value!r}, got {found!r:.80}")
    if not isinstance(root.get(SKIPPED, False), bool):
        raise ConfigError(f"{path}: {SKIPPED} must be true or false, got {root[SKIPPED]!r:.80}")


def index_of(path: Path, root: Mapping[str, Any], index: Mapping[str, Any]) -> dict[str, Any]:
    """What model_index.json says, with what the root's config.json says of experts in its place, which
    Bernini-R's loader reads alone. Raises ConfigError."""
    own = {name: value for name, value in index.items() if name not in ("transformer_2", "boundary_ratio")}
    if skips(root):
        return own
    found = root.get("switch_dit_boundary", 0.875)
    if not (is_number(found) and 0 < found < 1):
        raise ConfigError(f"{path}: switch_dit_boundary must be between 0 and 1, got {found!r:.80}")
    return own | {"boundary_ratio": float(found)}


def skips(root: Mapping[str, Any]) -> bool:
    """Whether there is one transformer alone, whatever lies in the folder."""
    return is_bernini(root) and root.get(SKIPPED, False) is True


def own_grids(
    base: Base, adapter: ConceptConfig | None, references: int | None, side: int | None
) -> ConceptConfig | None:
    """How a Bernini-R takes pictures: up to `references`, each with a longer side of at most `side` pixels.
    None for any other model. Raises ConfigError."""
    if not is_bernini(base.root):
        if side is not None:
            raise ConfigError(f"{base.where} is no Bernini-R, whose references alone keep their own size")
        return None
    if adapter is not None:
        raise ConfigError(f"{base.where} is a Bernini-R, which takes pictures itself: no adapter")
    transformer = base.part("transformer")
    channels, made = (transformer.config.get(name) for name in ("in_channels", "out_channels"))
    plain = transformer.config.get("_class_name") != VACE_CLASS and made in (None, channels)
    if not plain or transformer.config.get("image_dim") is not None:
        raise ConfigError(
            f"{base.where / ROOT} says that the model is Bernini-R, whose transformer is a text-to-video "
            f"one: {transformer.told} is another"
        )
    count, side = REFERENCES if references is None else references, SIDE if side is None else side
    if not is_whole(count, most := MOST["max_concepts"]):
        raise ConfigError(f"references must be 1 to {most}, got {count!r:.60}")
    if not is_whole(side, MOST["picture_size"]) or side % PATCH:
        nearest = PATCH * max(1, min(round(side / PATCH), MOST["picture_size"] // PATCH))
        raise ConfigError(
            f"references cannot have a side of {side!r:.60} pixels: it must be a multiple of {PATCH} up to "
            f"{MOST['picture_size']}; the nearest that works is {nearest}"
        )
    return ConceptConfig(max_concepts=count, injection="none", given="grids", side=side)
