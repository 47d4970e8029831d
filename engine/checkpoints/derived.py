"""A part's configuration from its tensors' shapes, for layouts whose files do not tell it.

What shapes cannot tell is what every Wan has: heads of 128 channels, the constants of UMT5 and of open-CLIP,
the statistics of the VAE's latents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..presets import preset
from .lazy_weights import Stored
from .safetensors_io import some

Tensors = Mapping[str, Stored]
HEAD = 128  # channels
WAN = "WanModel"  # the class of Wan's own transformers
WANS = (WAN, "VaceWanModel")
VACE_CLASS = "WanVACETransformer3DModel"
VACE = "vace_blocks."  # the start of names that only VACE has
CLIPS = {768: (12, "quick_gelu"), 1024: (16, "quick_gelu"), 1280: (16, "gelu"), 1664: (16, "gelu")}
"""Heads and activation of the CLIPs that there are, by their width: OpenAI's B and L, LAION's H and g."""
LATENTS = {16: "wan2.1-14b", 48: "wan2.2-ti2v-5b"}
"""The presets that hold the statistics of a VAE's latents, by its channels."""

# WanModel's names of what diffusers' transformer has.
WAN_CONFIG = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "eps": "eps",
}
WAN_FIXED = {"text_len": 512, "qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]}
"""What its configuration may say that every Wan has alike."""
OTHER_MODELS = {
    "face_adapter.": "Wan-Animate's",
    "motion_encoder.": "Wan-Animate's",
    "casual_audio_encoder.": "Wan-S2V's",
    "audio_injector.": "Wan-S2V's",
    "ref_conv.": "VideoX-Fun's",
    "control_adapter.": "VideoX-Fun's",
}
"""What only transformers have that are no plain Wan: the start of a name, and whose it is."""


def derive(part: str, tensors: Tensors, where: Path, told: Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration of one of base.PARTS, as its config.json would say it.

    Args: tensors: under diffusers' or transformers' names; where: the file, for messages; told: a config.json
        that lies beside the file, of diffusers' or Wan's own, which wins.
    Raises: ConfigError, one line, where tensors are missing or a shape is none that the part can have.
    """
    own = dict(told or {})
    if part.startswith("transformer"):
        whose = next(
            (OTHER_MODELS[at] for at in OTHER_MODELS for name in tensors if name.startswith(at)), None
        )
        if whose is not None:
            raise ConfigError(f"{where} is {whose} transformer, which the engine does not have")
        kind = own.get("_class_name", VACE_CLASS)
        if any(name.startswith(VACE) for name in tensors) and kind not in (VACE_CLASS, *WANS):
            raise ConfigError(f"{where} is VACE's transformer, which its configuration calls {kind!r:.80}")
    if part.startswith("transformer") and "dim" in own and own.get("_class_name", WAN) in WANS:
        return _from_wan_model(own, _Shapes(tensors, where))
    if told is not None:
        return own
    kinds = {"vae": _vae, "text_encoder": _text_encoder, "image_encoder": _image_encoder}
    return kinds.get(part, _transformer)(_Shapes(tensors, where))


class _Shapes:
    """Shapes by name, with an error for each that is not there or has other axes."""

    def __init__(self, tensors: Tensors, where: Path) -> None:
        self.tensors, self.where = tensors, where

    def __call__(self, name: str, axes: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ConfigError(f"{self.where} has no {name}, which tells the size of the model")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != axes or not all(shape):
            raise ConfigError(f"{self.where}: {name} is {shape}, expected {axes} axes")
        return shape

    def count(self, pattern: str) -> int:
        """One more than the largest number that is the group of `pattern` at a name's start."""
        found = [int(m[1]) for name in self.tensors if (m := re.match(pattern, name)) is not None]
        return max(found, default=-1) + 1

    def refuse(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {problem}")


def _transformer(shape: _Shapes) -> dict[str, Any]:
    width, channels, *patch = shape("patch_embedding.weight", 5)
    text = shape("condition_embedder.text_embedder.linear_1.weight", 2)[1]
    out = shape("proj_out.weight", 2)[0]
    if width % HEAD:
        raise shape.refuse(
            f"the width is {width}, no multiple of {HEAD}: a config.json or NAME.json beside tells the heads"
        )
    values: dict[str, Any] = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": patch,
        "num_attention_heads": width // HEAD,
        "attention_head_dim": HEAD,
        "in_channels": channels,
        "out_channels": out // (patch[0] * patch[1] * patch[2]),
        "text_dim": text,
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": shape.count(r"blocks\.(\d{1,4})\."),
        "cross_attn_norm": "blocks.0.norm2.weight" in shape.tensors,
    }
    return values | _pictures(shape, width) | _vace(shape, values["num_layers"])


def _vace(shape: _Shapes, layers: Any) -> dict[str, Any]:
    """Of a VACE, whose own blocks' hints are added behind every so many others, as ComfyUI has it, too."""
    if not any(name.startswith(VACE) for name in shape.tensors):
        return {}
    blocks = shape.count(r"vace_blocks\.(\d{1,4})\.")
    if type(layers) is not int or blocks < 1 or layers < blocks or layers % blocks:
        raise shape.refuse(
            f"{blocks} blocks of VACE's and {layers!r:.40} others do not tell where the hints go: a "
            "config.json beside tells the vace_layers"
        )
    return {
        "_class_name": VACE_CLASS,
        "vace_layers": list(range(0, layers, layers // blocks)),
        "vace_in_channels": shape("vace_patch_embedding.weight", 5)[1],
    }


def _pictures(shape: _Shapes, width: int) -> dict[str, Any]:
    """Of an image-to-video transformer that has a CLIP."""
    if "condition_embedder.image_embedder.norm1.weight" not in shape.tensors:
        return {}
    values: dict[str, Any] = {
        "image_dim": shape("condition_embedder.image_embedder.norm1.weight", 1)[0],
        "added_kv_proj_dim": width,
    }
    if (positions := "condition_embedder.image_embedder.pos_embed") in shape.tensors:
        values["pos_embed_seq_len"] = shape(positions, 3)[1]
    return values


def _from_wan_model(told: dict[str, Any], shape: _Shapes) -> dict[str, Any]:
    """Of Wan's own config.json, which leaves out what is the same for all."""
    kind = told.get("model_type", "t2v")
    if (kind == "vace" or "vace_layers" in told) and not any(n.startswith(VACE) for n in shape.tensors):
        raise shape.refuse(f"it is VACE's by its configuration, and has no {VACE}*")
    if kind not in ("t2v", "i2v", "flf2v", "ti2v", "vace"):
        raise shape.refuse(f"model_type is {kind!r:.40}, which the engine does not have")
    for name, value in WAN_FIXED.items():
        if (found := told.get(name, value)) != value:
            raise shape.refuse(f"{name} is {found!r:.40}, the engine has {value!r}")
    values: dict[str, Any] = {ours: told[theirs] for theirs, ours in WAN_CONFIG.items() if theirs in told}
    width, heads = told.get("dim"), told.get("num_heads")
    if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
        raise shape.refuse(f"dim {width!r:.40} and num_heads {heads!r:.40} give no width of a head")
    values |= {
        "_class_name": "WanTransformer3DModel",
        "_model_type": kind,
        "_name_or_path": told.get("_name_or_path"),
        "patch_size": list(shape("patch_embedding.weight", 5)[2:]),
        "attention_head_dim": width // heads,
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
    }
    values |= _pictures(shape, width)
    if not (told.get("vace_layers") and any(n.startswith(VACE) for n in shape.tensors)):
        return values | _vace(shape, told.get("num_layers", shape.count(r"blocks\.(\d{1,4})\.")))
    channels = shape("vace_patch_embedding.weight", 5)[1]
    more = {"vace_layers": told["vace_layers"], "vace_in_channels": told.get("vace_in_dim") or channels}
    return values | more | {"_class_name": VACE_CLASS}


def _text_encoder(shape: _Shapes) -> dict[str, Any]:
    first = "encoder.block.0.layer.0.SelfAttention"
    table = "shared.weight" if "shared.weight" in shape.tensors else "encoder.embed_tokens.weight"
    vocabulary, width = shape(table, 2)
    buckets, heads = shape(f"{first}.relative_attention_bias.weight", 2)
    inner = shape(f"{first}.q.weight", 2)[0]
    if inner % heads:
        raise shape.refuse(f"{first}.q.weight has {inner} rows, no multiple of {heads} heads")
    return {
        "model_type": "umt5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": shape.count(r"encoder\.block\.(\d{1,4})\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _image_encoder(shape: _Shapes) -> dict[str, Any]:
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in shape.tensors) else ""
    width, _, patch, _ = shape(f"{prefix}embeddings.patch_embedding.weight", 4)
    places = shape(f"{prefix}embeddings.position_embedding.weight", 2)[0]
    if width not in CLIPS:
        raise shape.refuse(
            f"no CLIP of width {width} is known: a config.json or NAME.json beside tells its heads"
        )
    heads, activation = CLIPS[width]
    projection = "visual_projection.weight"
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shape(f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)[0],
        "projection_dim": shape(projection, 2)[0] if projection in shape.tensors else width,
        "num_hidden_layers": shape.count(rf"{re.escape(prefix)}encoder\.layers\.(\d{{1,4}})\."),
        "num_attention_heads": heads,
        "image_size": patch * round((places - 1) ** 0.5),
        "patch_size": patch,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
    }


def _vae(shape: _Shapes) -> dict[str, Any]:
    base, channels = shape("encoder.conv_in.weight", 5)[:2]
    z, out = shape("post_quant_conv.weight", 5)[0], shape("decoder.conv_out.weight", 5)[0]
    nested = "encoder.down_blocks.0.resnets.0.conv1.weight" in shape.tensors
    stages = _nested_stages(shape) if nested else _flat_stages(shape)
    widths = [width for width, _, _ in stages]
    if not stages or any(width % base for width in widths):
        raise shape.refuse(f"the encoder's widths {widths} are no multiples of {base}")
    if z not in LATENTS:
        raise shape.refuse(
            f"no VAE of {z} latent channels is known ({some(map(str, LATENTS))} are): a config.json or "
            "NAME.json beside tells the mean and deviation of its latents"
        )
    multiples = [width // base for width in widths]
    last = shape("decoder.conv_in.weight", 5)[0]
    known, times = preset(LATENTS[z]).vae, [time for _, _, time in stages[:-1]]
    patch = round((channels / 3) ** 0.5)
    values: dict[str, Any] = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": base,
        "z_dim": z,
        "dim_mult": multiples,
        "num_res_blocks": stages[0][1],
        "attn_scales": [],
        "temperal_downsample": times,
        "latents_mean": known["latents_mean"],
        "latents_std": known["latents_std"],
        "scale_factor_temporal": 2 ** sum(times),
        "scale_factor_spatial": 2 ** (len(stages) - 1) * patch,
        "in_channels": channels,
        "out_channels": out,
    }
    if nested:
        values |= {"is_residual": True, "decoder_base_dim": last // multiples[-1]}
    return values | ({"patch_size": patch} if patch > 1 else {})


def _nested_stages(shape: _Shapes) -> list[tuple[int, int, bool]]:
    """Of an encoder as Wan2.2 has it: width, residual blocks, and whether time is halved, of each stage."""
    found = []
    for stage in range(shape.count(r"encoder\.down_blocks\.(\d{1,2})\.")):
        block = f"encoder.down_blocks.{stage}"
        width = shape(f"{block}.resnets.0.conv1.weight", 5)[0]
        count = shape.count(rf"{re.escape(block)}\.resnets\.(\d{{1,2}})\.")
        found.append((width, count, f"{block}.downsampler.time_conv.weight" in shape.tensors))
    return found


def _flat_stages(shape: _Shapes) -> list[tuple[int, int, bool]]:
    """The same of an encoder as Wan2.1 has it, one list of blocks."""
    found, blocks, width = [], 0, 0
    for index in range(shape.count(r"encoder\.down_blocks\.(\d{1,3})\.")):
        block = f"encoder.down_blocks.{index}"
        if f"{block}.resample.1.weight" in shape.tensors:
            found.append((width, blocks, f"{block}.time_conv.weight" in shape.tensors))
            blocks = 0
        else:
            blocks, width = blocks + 1, shape(f"{block}.conv1.weight", 5)[0]
    return [*found, (width, blocks, False)]
