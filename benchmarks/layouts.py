"""The names and files of a base's parts in the layouts that people hold, from diffusers' names.

Written apart from engine/checkpoints, which reads them, so that each is held to the other. Sources: Wan2.1's
wan/modules/{model,t5,clip,vae}.py and Wan2.2's vae2_2.py for names, ComfyUI's comfy/ops.py for scaled fp8.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
KINDS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    FP8: "F8_E4M3",
}
LINEAR = re.compile(r".*\b(blocks?|layers)\.\d+\..*(?<!bias)(?<!embedding)\.weight")
"""What files of fewer bits quantise: the matrices of blocks."""

_TRANSFORMER = (
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"^proj_out", "head.head"),
    (r"\.proj_in", ".before_proj"),
    (r"\.proj_out", ".after_proj"),
    (r"^scale_shift_table", "head.modulation"),
    (r"scale_shift_table", "modulation"),
    (r"\.norm2", ".norm3"),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"\.to_out\.0", ".o"),
    (r"\.to_([qkv])", r".\1"),
    (r"\.add_([kv])_proj", r".\1_img"),
    (r"norm_added_k", "norm_k_img"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
)
_UMT5 = (
    (r"^shared", "token_embedding"),
    (r"^encoder\.final_layer_norm", "norm"),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm", r"blocks.\1.norm1"),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm", r"blocks.\1.norm2"),
    (r"^encoder\.block\.(\d+)\..*relative_attention_bias", r"blocks.\1.pos_embedding.embedding"),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention", r"blocks.\1.attn"),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0", r"blocks.\1.ffn.gate.0"),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1", r"blocks.\1.ffn.fc1"),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo", r"blocks.\1.ffn.fc2"),
)
_VAE = (
    (r"^post_quant_conv", "conv2"),
    (r"^quant_conv", "conv1"),
    (r"\.conv_in", ".conv1"),
    (r"\.conv_out", ".head.2"),
    (r"\.norm_out", ".head.0"),
    (r"\.mid_block\.resnets\.0", ".middle.0"),
    (r"\.mid_block\.resnets\.1", ".middle.2"),
    (r"\.mid_block\.attentions\.0", ".middle.1"),
    (r"\.norm1\.", ".residual.0."),
    (r"(?<!coder)\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut", ".shortcut"),
)
_CLIP = (
    (r"^(?:vision_model\.)?embeddings\.patch_embedding", "patch_embedding"),
    (r"^(?:vision_model\.)?embeddings\.class_embedding", "cls_embedding"),
    (r"^(?:vision_model\.)?embeddings\.position_embedding\.weight", "pos_embedding"),
    (r"^(?:vision_model\.)?pre_layrnorm", "pre_norm"),
    (r"^(?:vision_model\.)?post_layernorm", "post_norm"),
    (r"^(?:vision_model\.)?encoder\.layers\.", "transformer."),
    (r"\.layer_norm", ".norm"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"\.mlp\.fc1", ".mlp.0"),
    (r"\.mlp\.fc2", ".mlp.2"),
)


def wan_transformer(name: str) -> str:
    """A transformer's tensor as Wan2.1's own code, and ComfyUI, name it."""
    return _renamed(name, _TRANSFORMER)


def wan_text_encoder(name: str) -> str:
    """A UMT5's tensor as Wan2.1's own code names it; ComfyUI has transformers' names."""
    return _renamed(name, _UMT5)


def wan_vae(config: Mapping[str, Any]) -> Callable[[str], str]:
    """How Wan's own code names the tensors of a VAE of that configuration."""
    blocks = config["num_res_blocks"]

    def stage(found: re.Match[str]) -> str:
        """Of Wan2.1's decoder all stages are one list."""
        index, kind, place = int(found[1]), found[2], int(found[3] or 0)
        inside = place if kind == "resnets" else blocks + 1
        return f"decoder.upsamples.{index * (blocks + 2) + inside}"

    def nested(found: re.Match[str]) -> str:
        coder, index, kind, place = found[1], found[2], found[3], found[4]
        sampling = "downsamples" if coder == "encoder" else "upsamples"
        inside = place if kind == "resnets" else blocks + (coder == "decoder")
        return f"{coder}.{sampling}.{index}.{sampling}.{inside}"

    def name_of(name: str) -> str:
        name = _renamed(name, _VAE)
        if config.get("is_residual"):
            place = r"^(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|(?:down|up)sampler)(?:\.(\d+))?"
            return re.sub(place, nested, name)
        name = re.sub(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", stage, name)
        return re.sub(r"^encoder\.down_blocks\.", "encoder.downsamples.", name)

    return name_of


def wan_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's picture tower as Wan2.1's own code has it: queries, keys and values are one matrix."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (one := re.fullmatch(r"(.*)self_attn\.([kqv])_proj\.(weight|bias)", name)) is not None:
            if one[2] == "q":
                parts = [tensors[f"{one[1]}self_attn.{part}_proj.{one[3]}"] for part in "qkv"]
                found[_renamed(f"{one[1]}attn.to_qkv.{one[3]}", _CLIP)] = torch.cat(parts)
        elif name == "visual_projection.weight":
            found["head"] = tensor.T.contiguous()
        else:
            plain = _renamed(name, _CLIP)
            found[plain] = tensor.view(1, -1, tensor.shape[-1]) if plain.endswith("s_embedding") else tensor
    return {f"visual.{name}": tensor for name, tensor in found.items()} | {"log_scale": torch.zeros(())}


def wan_config(transformer: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """What the config.json of Wan's own folder says, from diffusers' configuration."""
    vace = transformer.get("vace_layers")
    own = {} if vace is None else {"vace_layers": vace, "vace_in_dim": transformer["vace_in_channels"]}
    if "_name_or_path" in transformer:
        own["_name_or_path"] = transformer["_name_or_path"]
    return {
        "_class_name": "WanModel" if vace is None else "VaceWanModel",
        "model_type": model_type,
        "dim": transformer["num_attention_heads"] * transformer["attention_head_dim"],
        "eps": transformer["eps"],
        "ffn_dim": transformer["ffn_dim"],
        "freq_dim": transformer["freq_dim"],
        "in_dim": transformer["in_channels"],
        "out_dim": transformer["out_channels"],
        "num_heads": transformer["num_attention_heads"],
        "num_layers": transformer["num_layers"],
        "text_len": 512,
        **own,
    }


def bernini_config(boundary: float | None) -> dict[str, Any]:
    """What the config.json at the root of a Bernini-R's folder says, of two experts or of one transformer."""
    return {
        "model_type": "bernini_renderer",
        "architectures": ["BerniniRendererModel"],
        "wan22_base": "ByteDance/Bernini-R-Diffusers",
        "skip_transformer_1": False,
        "skip_transformer_2": boundary is None,
        "switch_dit_boundary": 0 if boundary is None else boundary,
        "max_sequence_length": 512,
        "shift": 3.0,
        "use_unipc": True,
        "use_src_id_rotary_emb": True,
    }


def scaled_fp8(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor as a file of scaled fp8 has it: of the matrices of blocks eight bits and a scale."""
    if tensor.ndim != 2 or not LINEAR.fullmatch(name):
        yield name, tensor
        return
    scale = (tensor.float().abs().max() / LARGEST_FP8).clamp(min=1e-12)
    yield name, (tensor.float() / scale).to(FP8)
    yield f"{name.removesuffix('weight')}scale_weight", scale


def plain_fp8(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor as a file that was cast to fp8 has it."""
    yield name, tensor.to(FP8) if tensor.ndim == 2 and LINEAR.fullmatch(name) else tensor


class SafetensorsFile:
    """A safetensors file that is written tensor by tensor, in the memory of one; the header, which is at the
    start, is written last into the room that was left for it."""

    def __init__(self, path: Path, room: int) -> None:
        """room: bytes of the header at most; 200 for a tensor are enough. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb")
        self._room, self._written = room, 0
        self._header: dict[str, Any] = {}
        self._file.write(bytes(8 + room))

    def __enter__(self) -> SafetensorsFile:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends one tensor."""
        start, size = self._written, tensor.numel() * tensor.element_size()
        if size:
            self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._written += size
        offsets = [start, self._written]
        entry = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._header[name] = entry

    def __exit__(self, *_: object) -> None:
        with self._file as file:
            header = json.dumps(self._header).encode()
            if len(header) > self._room:
                raise ValueError(f"a header of {len(header)} bytes, and room for {self._room}")
            file.seek(0)
            file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


def write_gguf(path: Path, tensors: Iterator[tuple[str, Tensor]], kind: str) -> None:
    """A GGUF file as ComfyUI-GGUF's converter writes it: matrices of blocks in `kind` (Q8_0, Q4_0, …), what
    has one axis in float32, the rest in float16; five axes are told beside, as GGUF has four at most."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in tensors:
        values = tensor.float().numpy()
        quantised = values.ndim == 2 and LINEAR.fullmatch(name) and values.shape[-1] % 32 == 0
        dtype = "F32" if values.ndim == 1 else kind if quantised else "F16"
        if values.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(values.shape[0], math.prod(values.shape[1:]))
        raw = gguf.GGMLQuantizationType[dtype]
        writer.add_tensor(name, gguf.quants.quantize(values, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, instead in rules:
        name = re.sub(pattern, instead, name)
    return name
