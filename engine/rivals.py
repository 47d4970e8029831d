"""Other systems' concept part on a base of ours: the configurations that the paper's table 1 asks for.

What each does is in rival_encoders.py, and how its tokens enter: beside the text's, with the same query and
keys that start as the text's (`shared_query`, `text`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from .config import ModelConfig

SYSTEMS = ("ip-adapter", "ssr-encoder", "ms-diffusion")


def like(base: ModelConfig, system: str) -> ModelConfig:
    """`base` with the concept part of another system, one of SYSTEMS, in its own numbers of tokens, layers
    and heads; widths, sizes and the number of concepts are the base's. Raises ConfigError for an unknown one.

    ip-adapter: 4 tokens of the image embedding; all of a request's pictures are on one. ssr-encoder: a token
    for each of a label's and for each of six layers of the picture encoder, in equal steps up to the last
    (of fewer than six layers: for each). ms-diffusion: 16 tokens, 4 layers, seen inside of the concept's box.
    """
    picture, concept = base.image_encoder, base.concept
    patches = (concept.picture_size // picture["patch_size"]) ** 2
    hidden: dict[str, Any] = {
        "picture_dim": picture["hidden_size"],
        "picture_tokens": patches + 1,
        "mask": "none",
    }
    own: dict[str, Any]
    if system == "ip-adapter":
        own = {
            "encoder": "image_embedding",
            "max_concepts": 1,
            "tiled": concept.max_concepts,
            "picture_dim": picture["projection_dim"],
            "picture_tokens": 1,
            "queries": 4,
            "mask": "none",
        }
    elif system == "ssr-encoder":
        count = picture["num_hidden_layers"]
        every = max(1, count // 6)
        layers = tuple(range(every, count + 1, every))
        own = hidden | {
            "encoder": "label_selected",
            "picture_layers": layers,
            "picture_tokens": len(layers) * (patches + 1),
            "queries": len(layers) * concept.label_tokens,
            "heads": 8,
        }
    elif system == "ms-diffusion":
        heads = picture["num_attention_heads"]
        own = hidden | {"encoder": "grounded", "queries": 16, "layers": 4, "heads": heads, "mask": "boxes"}
    else:
        raise ConfigError(f"unknown system {system!r}; there are {', '.join(SYSTEMS)}")
    width = base.transformer.width
    entered: dict[str, Any] = {"width": width, "binding": "none", "injection": "shared_query", "keys": "text"}
    return replace(base, concept=replace(concept, **own, **entered))
