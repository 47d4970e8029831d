"""What a file's tensors are part of, and their names in diffusers and transformers.

Every part has more than one spelling. They are told by the keys, never by the file's name. Sources: Wan2.1's
wan/modules/{model,t5,clip,vae}.py and Wan2.2's vae2_2.py, whose names ComfyUI keeps for transformer and VAE;
diffusers' loaders/single_file_utils.py and scripts/convert_wan_to_diffusers.py; for llama.cpp's names of T5
ComfyUI-GGUF's loader.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ...errors import WeightsError
from .fp8 import descaled
from .lazy_weights import Stored
from .wan_names import diffusers_name

Tensors = Mapping[str, Stored]
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
"""Before all names in some of ComfyUI's files: two of transformers, one of VAEs."""


class Spelling(NamedTuple):
    """One way in which a part's tensors are named: the part, a tensor that only it has, and what gives the
    same tensors under diffusers' or transformers' names."""

    part: str
    marker: str
    renamed: Callable[[Tensors], dict[str, Stored]]


def spelling_of(tensors: Tensors) -> Spelling | None:
    """How these tensors are spelled; None for what is no part of a Wan, as a T5, which has UMT5's names but
    relative positions in its first layer alone."""
    layer, bias = "encoder.block.1.layer.0.SelfAttention", "relative_attention_bias.weight"
    if f"{layer}.q.weight" in tensors and f"{layer}.{bias}" not in tensors:
        return None
    return next((spelling for spelling in SPELLINGS if spelling.marker in tensors), None)


def as_diffusers(part: str, tensors: Tensors, where: Path) -> dict[str, Stored]:
    """The tensors of one of base.PARTS under diffusers' or transformers' names, times their scales; what has
    none of SPELLINGS keeps its names. Raises WeightsError, one line."""
    plain = descaled(without_prefix(tensors), where)
    spelling = spelling_of(plain)
    if spelling is None or spelling.part != part.removesuffix("_2"):
        return plain
    try:
        return spelling.renamed(plain)
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from error


def without_prefix(tensors: Tensors) -> dict[str, Stored]:
    """The tensors without the first of PREFIXES that any has."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _as_they_are(tensors: Tensors) -> dict[str, Stored]:
    return dict(tensors)


def _by_rules(*rules: tuple[str, str]) -> Callable[[Tensors], dict[str, Stored]]:
    """Renames by the first of these patterns that is the whole of a name; what none is keeps its name."""
    compiled = [(re.compile(pattern), instead) for pattern, instead in rules]

    def renamed(name: str) -> str:
        for pattern, instead in compiled:
            if (found := pattern.fullmatch(name)) is not None:
                return found.expand(instead)
        return name

    return lambda tensors: _each(renamed, tensors)


def _each(renamed: Callable[[str], str], tensors: Tensors) -> dict[str, Stored]:
    """The tensors under other names. Raises ValueError where two have the same."""
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if (new := renamed(name)) in found:
            raise ValueError(f"it has {new!r:.200} twice, also as {name!r:.200}")
        found[new] = tensor
    return found


# UMT5.
_ATTENTION, _FEED = r"encoder.block.\1.layer.0.", r"encoder.block.\1.layer.1."
_WAN_UMT5 = _by_rules(
    (r"token_embedding\.weight", "shared.weight"),
    (r"norm\.weight", "encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", _ATTENTION + "layer_norm.weight"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.weight", _ATTENTION + r"SelfAttention.\2.weight"),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        _ATTENTION + "SelfAttention.relative_attention_bias.weight",
    ),
    (r"blocks\.(\d+)\.norm2\.weight", _FEED + "layer_norm.weight"),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.weight", _FEED + "DenseReluDense.wi_0.weight"),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", _FEED + "DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", _FEED + "DenseReluDense.wo.weight"),
)
_LLAMA_T5_ENCODER = _by_rules(
    (r"token_embd\.weight", "shared.weight"),
    (r"enc\.output_norm\.weight", "encoder.final_layer_norm.weight"),
    (r"enc\.blk\.(\d+)\.attn_norm\.weight", _ATTENTION + "layer_norm.weight"),
    (r"enc\.blk\.(\d+)\.attn_([qkvo])\.weight", _ATTENTION + r"SelfAttention.\2.weight"),
    (r"enc\.blk\.(\d+)\.attn_rel_b\.weight", _ATTENTION + "SelfAttention.relative_attention_bias.weight"),
    (r"enc\.blk\.(\d+)\.ffn_norm\.weight", _FEED + "layer_norm.weight"),
    (r"enc\.blk\.(\d+)\.ffn_gate\.weight", _FEED + "DenseReluDense.wi_0.weight"),
    (r"enc\.blk\.(\d+)\.ffn_up\.weight", _FEED + "DenseReluDense.wi_1.weight"),
    (r"enc\.blk\.(\d+)\.ffn_down\.weight", _FEED + "DenseReluDense.wo.weight"),
)


_DECODER = ("dec.", "output.", "decoder.", "lm_head.")


def _without_decoder(
    encoder: Callable[[Tensors], dict[str, Stored]],
) -> Callable[[Tensors], dict[str, Stored]]:
    """llama.cpp's and transformers': a file may hold the decoder, too, which Wan does not have."""
    return lambda tensors: encoder({k: v for k, v in tensors.items() if not k.startswith(_DECODER)})


# CLIP's picture tower.
_LAYER = r"vision_model.encoder.layers.\1."
_WAN_CLIP = _by_rules(
    (r"patch_embedding\.(\w+)", r"vision_model.embeddings.patch_embedding.\1"),
    (r"cls_embedding", "vision_model.embeddings.class_embedding"),
    (r"pos_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"pre_norm\.(\w+)", r"vision_model.pre_layrnorm.\1"),
    (r"post_norm\.(\w+)", r"vision_model.post_layernorm.\1"),
    (r"head", "visual_projection.weight"),
    (r"transformer\.(\d+)\.norm([12])\.(\w+)", _LAYER + r"layer_norm\2.\3"),
    (r"transformer\.(\d+)\.attn\.([qkv])\.(\w+)", _LAYER + r"self_attn.\2_proj.\3"),
    (r"transformer\.(\d+)\.attn\.proj\.(\w+)", _LAYER + r"self_attn.out_proj.\2"),
    (r"transformer\.(\d+)\.mlp\.0\.(\w+)", _LAYER + r"mlp.fc1.\2"),
    (r"transformer\.(\d+)\.mlp\.2\.(\w+)", _LAYER + r"mlp.fc2.\2"),
)


def _wan_clip(tensors: Tensors) -> dict[str, Stored]:
    """Wan's own: beside the tower lies a text encoder, which nothing reads; queries, keys and values are one
    matrix, the embeddings have axes of one in front, the projection is transposed."""
    found: dict[str, Stored] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("visual.")
        if name == key:
            continue
        if ".attn.to_qkv." in name:
            rows = (tensor.shape[0] // 3, *tensor.shape[1:])
            for i, part in enumerate("qkv"):
                found[name.replace("to_qkv", part)] = tensor.then(_third(i), rows)
        elif name in ("cls_embedding", "pos_embedding") and tensor.shape[:-1].numel() > 0:
            last = tensor.shape[-1]
            shape = (last,) if name == "cls_embedding" else (tensor.shape.numel() // max(last, 1), last)
            found[name] = tensor.then(_reshaped(shape), shape)
        elif name == "head":
            found[name] = tensor.then(lambda values: values.t().contiguous(), tensor.shape[::-1])
        else:
            found[name] = tensor
    return _WAN_CLIP(found)


def _third(index: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.chunk(3)[index].clone()


def _reshaped(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda values: values.reshape(shape)


# The VAE.
_INSIDE = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_WAN_VAE_OUTSIDE = _by_rules(
    (r"conv1\.(\w+)", r"quant_conv.\1"),
    (r"conv2\.(\w+)", r"post_quant_conv.\1"),
    (r"(\w+coder)\.conv1\.(\w+)", r"\1.conv_in.\2"),
    (r"(\w+coder)\.head\.0\.(\w+)", r"\1.norm_out.\2"),
    (r"(\w+coder)\.head\.2\.(\w+)", r"\1.conv_out.\2"),
    (r"(\w+coder)\.middle\.0\.(.+)", r"\1.mid_block.resnets.0.\2"),
    (r"(\w+coder)\.middle\.1\.(.+)", r"\1.mid_block.attentions.0.\2"),
    (r"(\w+coder)\.middle\.2\.(.+)", r"\1.mid_block.resnets.1.\2"),
)


def _wan_vae(tensors: Tensors) -> dict[str, Stored]:
    """Wan's own. In Wan2.1's the stages of the encoder, and of the decoder, are one list of blocks, in
    Wan2.2's a list each."""
    flat = re.compile(r"decoder\.upsamples\.(\d{1,4})\.(residual|resample|time_conv|shortcut)\..+")
    places = {int(m[1]): m[2] for name in tensors if (m := flat.fullmatch(name)) is not None}
    stages, stage, inside = {}, 0, 0
    for index in sorted(places):
        if places[index] in ("resample", "time_conv"):
            stages[index] = f"decoder.up_blocks.{stage}.upsamplers.0"
            stage, inside = stage + 1, 0
        else:
            stages[index] = f"decoder.up_blocks.{stage}.resnets.{inside}"
            inside += 1
    nested = re.compile(r"(en|de)coder\.(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)")

    def renamed(name: str) -> str:
        if (found := nested.fullmatch(name)) is not None:
            coder, way, index, place, rest = found.groups()
            sampling = rest.startswith(("resample.", "time_conv."))
            part = f"{way}sampler" if sampling else f"resnets.{place}"
            name = f"{coder}coder.{way}_blocks.{index}.{part}.{rest}"
        elif (found := flat.fullmatch(name)) is not None:
            name = name.replace(f"decoder.upsamples.{found[1]}", stages[int(found[1])], 1)
        else:
            name = re.sub(r"^encoder\.downsamples\.", "encoder.down_blocks.", name)
        for theirs, ours in _INSIDE.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        return name

    return _each(renamed, _WAN_VAE_OUTSIDE(tensors))


SPELLINGS = (
    Spelling(
        "transformer",
        "blocks.0.self_attn.q.weight",
        lambda tensors: _each(diffusers_name, tensors),
    ),
    Spelling("transformer", "blocks.0.attn1.to_q.weight", _as_they_are),
    Spelling("vae", "decoder.middle.0.residual.0.gamma", _wan_vae),
    Spelling("vae", "decoder.mid_block.resnets.0.norm1.gamma", _as_they_are),
    Spelling(
        "text_encoder", "encoder.block.0.layer.0.SelfAttention.q.weight", _without_decoder(_as_they_are)
    ),
    Spelling("text_encoder", "blocks.0.attn.q.weight", _WAN_UMT5),
    Spelling("text_encoder", "enc.blk.0.attn_q.weight", _without_decoder(_LLAMA_T5_ENCODER)),
    Spelling("image_encoder", "visual.transformer.0.attn.to_qkv.weight", _wan_clip),
    Spelling("image_encoder", "vision_model.encoder.layers.0.self_attn.q_proj.weight", _as_they_are),
    Spelling("image_encoder", "encoder.layers.0.self_attn.q_proj.weight", _as_they_are),
)
