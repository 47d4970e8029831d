"""Named configurations: `tiny` for tests, `stickers` and `sprites`, Wan2.1's sizes, Wan2.2's, and those of
models that take references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from .concept_config import ConceptConfig
from .config import ModelConfig
from .transformer_config import TransformerConfig


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


def _wan_experts(name: str, boundary: float, pictures: bool) -> ModelConfig:
    """Wan2.2's two experts of 14B; pictures: image-to-video, which has no picture encoder."""
    base = _wan(name, heads=40, layers=40, ffn_dim=13824)
    concept, channels = ConceptConfig(injection="none"), base.transformer.in_channels
    if pictures:
        concept = replace(concept, max_concepts=2, given="first_last")
        channels += base.vae["scale_factor_temporal"] + base.vae["z_dim"]
    return replace(
        base,
        transformer=replace(base.transformer, in_channels=channels),
        concept=concept,
        image_encoder={},
        boundary=boundary,
        width=1280,
        height=720,
    )


def _vace(name: str, heads: int, layers: int, ffn_dim: int, every: int) -> ModelConfig:
    """VACE on Wan2.1, a hint behind every so many blocks; with one reference picture."""
    base = _wan(name, heads, layers, ffn_dim)
    transformer = replace(base.transformer, vace_layers=tuple(range(0, layers, every)), vace_in_channels=96)
    concept = ConceptConfig(max_concepts=1, injection="none", given="control")
    return replace(base, transformer=transformer, concept=concept, image_encoder={})


VIT_H = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1024,
}
"""The picture encoder of Wan2.1's image-to-video models, and of what was made of them: CLIP's ViT-H/14."""


def from_pictures(base: ModelConfig, pictures: int, given: str) -> ModelConfig:
    """`base` as an image-to-video model like Wan2.1's: 36 channels in, and tokens of so many pictures."""
    width = VIT_H["hidden_size"]
    concept = ConceptConfig(
        max_concepts=pictures,
        picture_size=VIT_H["image_size"],
        picture_tokens=(VIT_H["image_size"] // VIT_H["patch_size"]) ** 2 + 1,
        picture_dim=width,
        width=width,
        heads=1,
        injection="base",
        given=given,
    )
    transformer = replace(
        base.transformer, in_channels=36, image_dim=width, added_kv_proj_dim=base.transformer.width
    )
    return replace(base, transformer=transformer, concept=concept, image_encoder=dict(VIT_H))


def _magref() -> ModelConfig:
    """MAGREF: Wan2.1's I2V-14B, whose first frame is a canvas of references."""
    base = _wan("magref-14b", heads=40, layers=40, ffn_dim=13824)
    return replace(from_pictures(base, 1, "canvas"), fps=15.0)


def _behind(name: str, heads: int, layers: int, ffn_dim: int, count: int = 1, **more: Any) -> ModelConfig:
    """Wan2.1 with references behind the video: Phantom with one, SkyReels-V3 with up to four."""
    fewest = 1 if count > 1 else None
    concept = ConceptConfig(max_concepts=count, injection="none", given="behind", fewest=fewest)
    return replace(_wan(name, heads, layers, ffn_dim), concept=concept, image_encoder={}, **more)


def _bernini(base: ModelConfig, name: str) -> ModelConfig:
    """Bernini-R on a Wan of text alone; with four references."""
    concept = ConceptConfig(injection="none", given="grids", side=848)
    own = replace(base, name=name, concept=concept, image_encoder={}, guidance_rule="projected")
    return replace(own, width=848, height=480)


# Statistics of Wan2.2's VAE of 48 channels, as Wan2.2's own vae2_2.py has them.
_WAN22_MEAN = [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557]
_WAN22_MEAN += [-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825]
_WAN22_MEAN += [-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502]
_WAN22_MEAN += [-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230]
_WAN22_MEAN += [-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748]
_WAN22_MEAN += [0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667]
_WAN22_STD = [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013]
_WAN22_STD += [0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978]
_WAN22_STD += [0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659]
_WAN22_STD += [0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093]
_WAN22_STD += [0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887]
_WAN22_STD += [0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744]


def _wan22_5b() -> ModelConfig:
    """Wan2.2's TI2V-5B, alone: text, and perhaps a first picture."""
    base = _wan("wan2.2-ti2v-5b", heads=24, layers=30, ffn_dim=14336)
    vae = {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": list(_WAN22_MEAN),
        "latents_std": list(_WAN22_STD),
    }
    return replace(
        base,
        transformer=replace(base.transformer, in_channels=48, out_channels=48),
        concept=ConceptConfig(max_concepts=1, injection="none", given="clean"),
        image_encoder={},
        vae=base.vae | vae,
        frames=121,
        height=704,
        width=1280,
        fps=24.0,
    )


_BUILDERS = {
    "tiny": _tiny,
    "sprites": _sprites,
    "stickers": _stickers,
    "wan2.1-1.3b": lambda: _wan("wan2.1-1.3b", heads=12, layers=30, ffn_dim=8960),
    "wan2.1-14b": lambda: _wan("wan2.1-14b", heads=40, layers=40, ffn_dim=13824),
    "wan2.1-vace-1.3b": lambda: _vace("wan2.1-vace-1.3b", heads=12, layers=30, ffn_dim=8960, every=2),
    "wan2.1-vace-14b": lambda: _vace("wan2.1-vace-14b", heads=40, layers=40, ffn_dim=13824, every=5),
    "magref-14b": _magref,
    "phantom-wan-1.3b": lambda: _behind("phantom-wan-1.3b", heads=12, layers=30, ffn_dim=8960),
    "phantom-wan-14b": lambda: _behind("phantom-wan-14b", 40, 40, 13824, frames=121, fps=24.0),
    "skyreels-v3-r2v-14b": lambda: _behind(
        "skyreels-v3-r2v-14b", 40, 40, 13824, count=4, width=1280, height=720, frames=121, fps=24.0
    ),
    "bernini-r-1.3b": lambda: _bernini(preset("wan2.1-1.3b"), "bernini-r-1.3b"),
    "bernini-r-14b": lambda: _bernini(preset("wan2.2-t2v-a14b"), "bernini-r-14b"),
    "wan2.2-t2v-a14b": lambda: _wan_experts("wan2.2-t2v-a14b", boundary=0.875, pictures=False),
    "wan2.2-i2v-a14b": lambda: _wan_experts("wan2.2-i2v-a14b", boundary=0.9, pictures=True),
    "wan2.2-ti2v-5b": _wan22_5b,
}

PRESETS = tuple(_BUILDERS)
"""Names that `preset` knows."""


def preset(name: str) -> ModelConfig:
    """A fresh ModelConfig by name: one of `PRESETS`. Raises ConfigError for an unknown name."""
    if name not in _BUILDERS:
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return _BUILDERS[name]()
