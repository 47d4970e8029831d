"""A Wan2.1 base of full size with random weights, to measure exports where the real ones cannot be had.

    python tests/full_size/random_base.py wan2.1-1.3b base/ [--a2] [--layers N] [--text-layers N]
        [--adapter FILE]

Writes the folder in diffusers' layout, tensor by tensor: it takes the memory of the largest. Transformer and
VAE are in float32, the encoders of text and pictures in bfloat16. With --adapter it writes concept modules
for that base, too, of which every layer shows in the video.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conceptmaster.engine.checkpoints.adapter import adapter_keys, save_adapter
from conceptmaster.engine.checkpoints.source import byte_tokenizer
from conceptmaster.engine.checkpoints.wan_image_to_video import A2_REFERENCES, A2_TRANSFORMER
from conceptmaster.engine.config import ConceptConfig, ModelConfig
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.presets import PRESETS, preset
from conceptmaster.engine.vae.wan_decoder import build_vae

SHARD = 2_000_000_000  # bytes after which a new file begins
# The picture encoder of Wan2.1's image-to-video models and of SkyReels-A2: CLIP's ViT-H/14.
VIT_H = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1024,
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


def like_a2(config: ModelConfig) -> ModelConfig:
    """`config` as an image-to-video model like SkyReels-A2: 36 channels in, ViT-H, three references."""
    transformer = dataclasses.replace(
        config.transformer,
        in_channels=36,
        image_dim=VIT_H["hidden_size"],
        added_kv_proj_dim=config.transformer.width,
    )
    concept = ConceptConfig(
        max_concepts=A2_REFERENCES,
        picture_size=VIT_H["image_size"],
        picture_tokens=(VIT_H["image_size"] // VIT_H["patch_size"]) ** 2 + 1,
        picture_dim=VIT_H["hidden_size"],
        width=VIT_H["hidden_size"],
        heads=1,
        injection="base",
        given="references",
    )
    return dataclasses.replace(config, transformer=transformer, concept=concept, image_encoder=VIT_H)


def write_base(config: ModelConfig, folder: Path, seed: int = 0) -> None:
    """Writes a base of `config`'s sizes to `folder`, which must not exist; without a CLIP where its injection
    is `none`.

    The weights are drawn so that activations neither vanish nor grow: with the standard deviation of one over
    the root of a row's length.
    """
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model, vae = ConceptMaster(config), build_vae(config)
    g = torch.Generator().manual_seed(seed)
    transformer = dataclasses.asdict(config.transformer)
    for own in ("position_channels", "prediction"):
        del transformer[own]
    parts: list[tuple[str, nn.Module, torch.dtype, dict[str, Any]]] = [
        ("transformer", model.transformer, torch.float32, {"_class_name": kind_of(config)}),
        ("vae", vae, torch.float32, {"_class_name": "AutoencoderKLWan"}),
        ("text_encoder", model.text_encoder.model, torch.bfloat16, {"model_type": "umt5"}),
    ]
    values = {"transformer": transformer, "vae": config.vae, "text_encoder": config.text_encoder}
    if config.concept.takes_pictures:
        kind = {"model_type": "clip_vision_model"}
        parts.append(("image_encoder", model.image_encoder.model, torch.bfloat16, kind))
        values["image_encoder"] = config.image_encoder
    for name, module, dtype, kind in parts:
        _json(folder / name / "config.json", kind | values[name])
        shapes = {key: value.shape for key, value in module.named_parameters()}
        if name == "transformer":
            shapes = {
                key: shape for key, shape in shapes.items() if key not in model.transformer.concept_keys()
            }
        _write(folder / name, shapes, dtype, g)
    _json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    (folder / "tokenizer").mkdir()
    tokenizer = byte_tokenizer(config.text_encoder["vocab_size"])
    (folder / "tokenizer" / "tokenizer.json").write_text(tokenizer, "utf-8")


def write_adapter(config: ModelConfig, path: Path, seed: int = 1) -> None:
    """Writes concept modules for the base of `config` to `path`, in float32: every layer is drawn, also those
    that a new adapter has at zero. Raises WeightsError where `config` takes no concepts."""
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = ConceptMaster(config)
    own = adapter_keys(model)
    drawn = {key: _draw(key, value.shape, g) for key, value in model.state_dict().items() if key in own}
    model.load_state_dict(drawn, strict=False, assign=True)
    save_adapter(model, path)


def kind_of(config: ModelConfig) -> str:
    """What the transformer's class is called in the folder's configuration."""
    return A2_TRANSFORMER if config.concept.given == "references" else "WanTransformer3DModel"


def _json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1), "utf-8")


def _write(part: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, g: torch.Generator) -> None:
    """Draws the tensors and writes them into shards and an index."""
    shard: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    left = list(shapes)
    while left:
        name = left.pop(0)
        shard[name] = _draw(name, shapes[name], g).to(dtype)
        if not left or sum(tensor.nbytes for tensor in shard.values()) >= SHARD:
            file = f"model-{len(set(files.values())):05}.safetensors"
            save_file(shard, part / file)
            files |= dict.fromkeys(shard, file)
            shard = {}
    _json(part / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def _draw(name: str, shape: torch.Size, g: torch.Generator) -> Tensor:
    """Random values as this kind of weight has them: norms around one, biases around zero."""
    values = torch.randn(shape, generator=g)
    if name.endswith("bias"):
        return values.mul_(0.02)
    if len(shape) == 1 or name.endswith("gamma"):
        return values.mul_(0.1).add_(1.0)
    if name.endswith(("shared.weight", "embedding.weight")):
        return values
    row = math.prod(shape[1:]) * (64 if name.endswith("SelfAttention.q.weight") else 1)  # T5 does not scale
    return values.mul_(1 / math.sqrt(row))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=PRESETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, metavar="N", help="of the transformer (all)")
    parser.add_argument("--text-layers", type=int, metavar="N", help="of the text encoder (all)")
    parser.add_argument("--a2", action="store_true", help="an image-to-video model like SkyReels-A2")
    parser.add_argument("--adapter", type=Path, metavar="FILE", help="where to write concept modules")
    args = parser.parse_args()
    config = like_a2(preset(args.name)) if args.a2 else preset(args.name)
    if args.layers:
        transformer = dataclasses.replace(config.transformer, num_layers=args.layers)
        config = dataclasses.replace(config, transformer=transformer)
    if args.text_layers:
        text_encoder = config.text_encoder | {"num_layers": args.text_layers}
        config = dataclasses.replace(config, text_encoder=text_encoder)
    write_base(config, args.folder)
    if args.adapter:
        write_adapter(config, args.adapter)


if __name__ == "__main__":
    main()
