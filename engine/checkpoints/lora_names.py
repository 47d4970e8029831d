"""The keys of LoRA files: which module of a Wan transformer each names, and which part of a change it holds.

Modules are named as diffusers does (`blocks.0.attn1.to_q`) or as Wan's own code does
(`blocks.0.self_attn.q`), with dots, or with underscores, as kohya's, Musubi-tuner's and LyCORIS's scripts do
(`lora_unet_blocks_0_self_attn_q`; VideoX-Fun writes `lora_unet__`). Before them stands what PEFT, diffusers,
ComfyUI or DiffSynth-Studio put there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .wan_names import wan_name

# Parts of names that in Wan mean an image-to-video model. Over a text-to-video base a ConceptDiT may have
# add_k_proj, add_v_proj and norm_added_k too, for its concepts: an image-to-video LoRA must not land there.
_IMAGE = ("add_k_proj", "add_v_proj", "norm_added_k", "image_embedder", "k_img", "v_img", "img_emb")

_PREFIXES = (
    "base_model.model.",
    "pipe.dit.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "transformer_2.",
    "lora_unet__",
    "lora_unet_",
    "lycoris_",
)
_ADAPTER = r"(?:\.(?!weight\b|bias\b|\w*scale)[\w-]+)?"  # PEFT's name of an adapter, `default` mostly
_PAIR = r"(?:\.lora_{0}|\.lora_{1}|[._]lora\.{1}|\.lora_linear_layer\.{1})" + _ADAPTER + r"(?:\.weight)?"
_ENDINGS = {
    _PAIR.format("A", "down"): "down",
    _PAIR.format("B", "up"): "up",
    rf"\.lora_mid{_ADAPTER}(?:\.weight)?": "mid",
    rf"\.lora_(?:B|up){_ADAPTER}\.bias": "up_bias",
    rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?": "magnitude",
    rf"\.(?P<part>lokr_(?:w[12](?:_[ab])?|t2)|hada_(?:w[12]_[ab]|t[12])){_ADAPTER}": "",
    r"\.(?P<part>alpha|dora_scale|diff|diff_b|reshape_weight)": "",
    r"\.w_norm": "diff",
    r"\.b_norm": "diff_b",
}
_KEYS = tuple((re.compile(f"(.+?){ending}"), part) for ending, part in _ENDINGS.items())
# Changes of other kinds, by what their keys have: PEFT's, and where there are two, LyCORIS's behind.
_OTHERS = {
    "OFT or BOFT": r"\.oft_blocks",
    "OFT": r"\.oft_",
    "BOFT": r"\.boft_",
    "VeRA": r"\.p?vera_",
    "GLoRA": r"\.glora_|\.[ab][12]\.weight$",
    "IA3": r"\.ia3_|\.on_input$",
    "AdaLoRA": r"\.lora_E|\.ranknum",
    "VB-LoRA": r"\.vblora_",
    "RandLoRA": r"\.randlora_",
    "DeLoRA": r"\.delora_",
    "FourierFT": r"\.fourierft_",
    "HRA": r"\.hra_",
    "MiSS": r"\.miss_",
    "Bone": r"\.bone_",
    "SHiRA": r"\.shira_",
    "RoAd": r"\.road_",
    "HiRA": r"\.hira_",
    "C3A": r"\.c3a_",
}


def modules(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every spelling of every module that a LoRA may change, to the module's name in `state`."""
    keys = [key for key in state if takes_images(state) or not about_images(key)]
    own = {key.removesuffix(".weight").removesuffix(".bias") for key in keys}
    dotted = {wan_name(module): module for module in own} | {module: module for module in own}
    return {name.replace(".", "_"): module for name, module in dotted.items()} | dotted


def read_key(key: str) -> tuple[str, str]:
    """A file's key -> the module without its prefixes, and which part of it the tensor is ("" if unknown)."""
    name = key
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name.endswith(".diff_m"):
        return name.removesuffix("diff_m") + "modulation", "diff"
    for pattern, part in _KEYS:
        if found := pattern.fullmatch(name):
            return found[1], part or found["part"]
    return name, ""


def other_kind(key: str) -> str | None:
    """What the key's change is called, where it is one that is not merged; None else."""
    return next((kind for kind, pattern in _OTHERS.items() if re.search(pattern, key)), None)


def takes_images(state: Mapping[str, Tensor]) -> bool:
    """Whether this is a model that reads pictures with a CLIP, as Wan2.1's image-to-video models do."""
    return any("image_embedder" in key for key in state)


def about_images(key: str) -> bool:
    """Whether a key is of something that only such a model has."""
    return any(part in key for part in _IMAGE)
