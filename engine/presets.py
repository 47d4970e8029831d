"""Named configurations: `tiny` for tests, `stickers` and `sprites`, and the two sizes of Wan2.1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from .config import ConceptConfig, ModelConfig, TransformerConfig


def _umt5(d_model: int, d_kv: int, heads: int, d_ff: int, layers: int, vocab: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "d_model": d_model,
        "d_kv": d_kv,
        "d_ff": d_ff,
        "num_layers": layers,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def _clip(
    hidden: int, layers: int, heads: int, mlp: int, patch: int, image: int, projection: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "patch_size": patch,
        "image_size": image,
        "projection_dim": projection,
    }


def _tiny() -> ModelConfig:
    return ModelConfig(
        name="tiny",
        transformer=TransformerConfig(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=48,
            num_layers=2,
            position_channels=6,
        ),
        concept=ConceptConfig(
            max_concepts=3,
            picture_size=16,
            picture_tokens=4,
            picture_dim=16,
            label_tokens=6,
            queries=2,
            layers=1,
            heads=2,
            width=16,
        ),
        text_encoder=_umt5(d_model=16, d_kv=8, heads=2, d_ff=32, layers=2, vocab=512),
        image_encoder=_clip(hidden=16, layers=2, heads=2, mlp=32, patch=8, image=16, projection=16),
        vae={
            "base_dim": 4,
            "z_dim": 4,
            "dim_mult": [1, 2, 4],
            "num_res_blocks": 1,
            "attn_scales": [],
            "temperal_downsample": [True, True],
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_temporal": 4,
            "scale_factor_spatial": 8,
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        text_tokens=24,
        frames=5,
        height=32,
        width=32,
        fps=8.0,
    )


def _sprites() -> ModelConfig:
    return ModelConfig(
        name="sprites",
        transformer=TransformerConfig(
            num_attention_heads=12,
            attention_head_dim=32,
            in_channels=128,
            out_channels=128,
            text_dim=128,
            freq_dim=128,
            ffn_dim=1152,
            num_layers=6,
            position_channels=24,
            prediction="sample",
        ),
        concept=ConceptConfig(
            max_concepts=4,
            picture_size=64,
            picture_tokens=64,
            picture_dim=128,
            label_tokens=8,
            queries=64,
            layers=2,
            heads=4,
            width=128,
        ),
        text_encoder=_umt5(d_model=128, d_kv=32, heads=4, d_ff=256, layers=2, vocab=512),
        image_encoder=_clip(hidden=128, layers=3, heads=4, mlp=256, patch=8, image=64, projection=128),
        vae={
            "kind": "blocks",
            "z_dim": 128,
            "width": 80,
            "layers": 5,
            "scale_factor_temporal": 4,
            "scale_factor_spatial": 8,
            "latents_mean": [0.0] * 128,
            "latents_std": [0.5] * 128,
        },
        text_tokens=48,
        frames=17,
        height=64,
        width=64,
        fps=8.0,
    )


def _stickers() -> ModelConfig:
    """The sprites' network for any word: four times the pixels, as many tokens."""
    base = _sprites()
    vae = {
        "z_dim": 192,
        "width": 96,
        "fold": 4,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 192,
        "latents_std": [0.5] * 192,
    }
    return replace(
        base,
        name="stickers",
        transformer=replace(base.transformer, in_channels=192, out_channels=192),
        concept=replace(base.concept, label_tokens=12),
        text_encoder=base.text_encoder | {"vocab_size": 2048},
        vae=base.vae | vae,
        text_tokens=64,
        height=128,
        width=128,
    )


# Statistics of Wan2.1's VAE, from its published configuration.
_WAN_MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
_WAN_MEAN += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
_WAN_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
_WAN_STD += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


def _wan(name: str, heads: int, layers: int, ffn_dim: int) -> ModelConfig:
    return ModelConfig(
        name=name,
        transformer=TransformerConfig(num_attention_heads=heads, num_layers=layers, ffn_dim=ffn_dim),
        concept=ConceptConfig(),
        text_encoder=_umt5(d_model=4096, d_kv=64, heads=64, d_ff=10240, layers=24, vocab=256384),
        image_encoder=_clip(hidden=1024, layers=24, heads=16, mlp=4096, patch=14, image=224, projection=768),
        vae={
            "base_dim": 96,
            "z_dim": 16,
            "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "attn_scales": [],
            "temperal_downsample": [False, True, True],
            "scale_factor_temporal": 4,
            "scale_factor_spatial": 8,
            "latents_mean": list(_WAN_MEAN),
            "latents_std": list(_WAN_STD),
        },
    )


_BUILDERS = {
    "tiny": _tiny,
    "sprites": _sprites,
    "stickers": _stickers,
    "wan2.1-1.3b": lambda: _wan("wan2.1-1.3b", heads=12, layers=30, ffn_dim=8960),
    "wan2.1-14b": lambda: _wan("wan2.1-14b", heads=40, layers=40, ffn_dim=13824),
}

PRESETS = tuple(_BUILDERS)
"""Names that `preset` knows."""


def preset(name: str) -> ModelConfig:
    """A fresh ModelConfig by name: one of `PRESETS`. Raises ConfigError for an unknown name."""
    if name not in _BUILDERS:
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return _BUILDERS[name]()
