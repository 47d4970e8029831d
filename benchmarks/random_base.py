"""A Wan2.1 base of full size with random weights, to measure what the real ones cannot be had for.

    python -m conceptmaster.benchmarks.random_base wan2.1-1.3b base/ [--a2] [--layers N] [--text-layers N]
        [--adapter FILE]

Writes the folder in diffusers' layout, file by file: on a CPU it takes the memory of the largest. Transformer
and VAE are in float32, the encoders of text and pictures in bfloat16. With --adapter it writes concept
modules for that base, too, of which every layer shows in the video. On a GPU, which `make gpu` has, other
values are drawn, in seconds instead of minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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

SHARD = 1_000_000_000  # bytes after which a new file begins
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


@dataclasses.dataclass(frozen=True)
class Part:
    """A folder of a base: the shapes of its tensors, the dtype of its file, its config.json."""

    name: str
    shapes: Mapping[str, torch.Size]
    dtype: torch.dtype
    values: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(shape.numel() for shape in self.shapes.values()) * self.dtype.itemsize


def parts_of(config: ModelConfig) -> list[Part]:
    """The parts of a base of `config`'s sizes; without a CLIP where it takes no pictures."""
    with torch.device("meta"):
        model, vae = ConceptMaster(config), build_vae(config)
    transformer = dataclasses.asdict(config.transformer)
    for own in ("position_channels", "prediction"):
        del transformer[own]
    concept = model.transformer.concept_keys()
    base = {name: shape for name, shape in _shapes(model.transformer).items() if name not in concept}
    text, wide, narrow = config.text_encoder, torch.float32, torch.bfloat16
    found = [
        Part("transformer", base, wide, {"_class_name": kind_of(config)} | transformer),
        Part("vae", _shapes(vae), wide, {"_class_name": "AutoencoderKLWan"} | config.vae),
        Part("text_encoder", _shapes(model.text_encoder.model), narrow, {"model_type": "umt5"} | text),
    ]
    if config.concept.takes_pictures:
        values = {"model_type": "clip_vision_model"} | config.image_encoder
        found.append(Part("image_encoder", _shapes(model.image_encoder.model), narrow, values))
    return found


def write_base(
    config: ModelConfig, folder: Path, seed: int = 0, device: str = "cpu", writers: int = 1
) -> None:
    """Writes a base of `config`'s sizes to `folder`, which must not exist; without a CLIP where its injection
    is `none`.

    The weights are drawn so that activations neither vanish nor grow: with the standard deviation of one over
    the root of a row's length. device: that draws them; another one draws others. writers: files of SHARD
    bytes that are written side by side, each in memory twice. Raises OSError.
    """
    folder.mkdir(parents=True)
    g = torch.Generator(device).manual_seed(seed)
    for part in parts_of(config):
        _json(folder / part.name / "config.json", part.values)
        _write(folder / part.name, part, g, writers)
    _json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    (folder / "tokenizer").mkdir()
    tokenizer = byte_tokenizer(config.text_encoder["vocab_size"])
    (folder / "tokenizer" / "tokenizer.json").write_text(tokenizer, "utf-8")


def adapter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """What concept modules for the base of `config` hold, by name."""
    with torch.device("meta"):
        model = ConceptMaster(config)
    own = adapter_keys(model)
    return {key: value.shape for key, value in model.state_dict().items() if key in own}


def write_adapter(config: ModelConfig, path: Path, seed: int = 1, device: str = "cpu") -> None:
    """Writes concept modules for the base of `config` to `path`, in float32: every layer is drawn, also those
    that a new adapter has at zero. Raises WeightsError where `config` takes no concepts."""
    g = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = ConceptMaster(config)
    drawn = {key: _draw(key, shape, g).cpu() for key, shape in adapter_shapes(config).items()}
    model.load_state_dict(drawn, strict=False, assign=True)
    save_adapter(model, path)


def kind_of(config: ModelConfig) -> str:
    """What the transformer's class is called in the folder's configuration."""
    return A2_TRANSFORMER if config.concept.given == "references" else "WanTransformer3DModel"


def _json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1), "utf-8")


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.named_parameters()}


def _write(folder: Path, part: Part, g: torch.Generator, writers: int) -> None:
    """Draws the tensors and writes them into files and an index."""
    shard: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    with ThreadPoolExecutor(writers) as pool:
        writing: list[Future[None]] = []
        final = list(part.shapes)[-1]
        for name, shape in part.shapes.items():
            shard[name] = _draw(name, shape, g).to(part.dtype).cpu()
            if name == final or sum(tensor.nbytes for tensor in shard.values()) >= SHARD:
                file = f"model-{len(set(files.values())):05}.safetensors"
                files |= dict.fromkeys(shard, file)
                if len(writing) >= writers:
                    writing[-writers].result()  # so that no more files are in memory
                writing.append(pool.submit(save_file, shard, folder / file))
                shard = {}
        for file_written in writing:
            file_written.result()
    _json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def _draw(name: str, shape: torch.Size, g: torch.Generator) -> Tensor:
    """Random values as this kind of weight has them: norms around one, biases around zero."""
    values = torch.randn(shape, generator=g, device=g.device)
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
