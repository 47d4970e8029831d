"""A Wan base of full size with random weights, to measure what the real ones cannot be had for.

    python -m conceptmaster.benchmarks.random_base wan2.1-1.3b base/ [--layout wan|comfyui] [--bits …] [--a2]
        [--layers N] [--text-layers N] [--adapter FILE]

Writes the folder in diffusers' layout, Wan's original one or as ComfyUI's single files, the same values in
each. On a CPU it takes the memory of one file of a gigabyte, or of one tensor; of a GGUF file the whole.
Transformer and VAE are in float32 unless `--bits` says otherwise, the encoders of text and pictures in
bfloat16. With --adapter it writes concept modules for that base, too, of which every layer shows in the
video. On a GPU, which `make gpu` has, other values are drawn, in seconds instead of minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conceptmaster.engine.checkpoints.adapter import adapter_keys, save_adapter
from conceptmaster.engine.checkpoints.source import byte_tokenizer
from conceptmaster.engine.checkpoints.wan_image_to_video import A2_REFERENCES, A2_TRANSFORMER
from conceptmaster.engine.checkpoints.wan_references import PHANTOM, V3_TRANSFORMERS
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.presets import PRESETS, from_pictures, preset
from conceptmaster.engine.vae.wan_decoder import build_vae

from . import layouts

LAYOUTS = ("diffusers", "wan", "comfyui")
BITS = ("float16", "bfloat16", "fp8", "fp8-scaled")
PREFIX = "model.diffusion_model."
SHARD = 1_000_000_000  # bytes after which a new file begins
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


def like_a2(config: ModelConfig) -> ModelConfig:
    """`config` as an image-to-video model like SkyReels-A2: 36 channels in, ViT-H, three references."""
    return from_pictures(config, A2_REFERENCES, "references")


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
    transformer = name_of(config) | config.to_dict()["transformer"]
    for own in ("position_channels", "prediction"):
        del transformer[own]
    concept = model.transformer.concept_keys()
    base = {name: shape for name, shape in _shapes(model.transformer).items() if name not in concept}
    text, wide, narrow = config.text_encoder, torch.float32, torch.bfloat16
    experts = ["transformer", *(["transformer_2"] if getattr(config, "boundary", None) is not None else [])]
    found = [
        *(Part(name, base, wide, {"_class_name": kind_of(config)} | transformer) for name in experts),
        Part("vae", _shapes(vae), wide, {"_class_name": "AutoencoderKLWan"} | config.vae),
        Part("text_encoder", _shapes(model.text_encoder.model), narrow, {"model_type": "umt5"} | text),
    ]
    if config.concept.takes_pictures:
        values = {"model_type": "clip_vision_model"} | config.image_encoder
        found.append(Part("image_encoder", _shapes(model.image_encoder.model), narrow, values))
    return found


def write_base(
    config: ModelConfig,
    folder: Path,
    seed: int = 0,
    device: str = "cpu",
    writers: int = 1,
    layout: str = "diffusers",
    bits: str | None = None,
) -> None:
    """Writes a base of `config`'s sizes to `folder`, which must not exist; without a CLIP where its injection
    is `none`.

    The weights are drawn so that activations neither vanish nor grow: with the standard deviation of one over
    the root of a row's length; the same for the same seed in each of LAYOUTS. device: that draws them;
    another one draws others. writers: files of SHARD bytes that are written side by side, each in memory
    twice. bits: of the transformer, one of BITS or a kind of GGUF; fp8 of the text encoder, too. Raises
    OSError.
    """
    folder.mkdir(parents=True)
    g = torch.Generator(device).manual_seed(seed)
    for part in parts_of(config):
        _Writer(config, folder, layout, bits, g, writers).write(part)
    tokenizer = byte_tokenizer(config.text_encoder["vocab_size"])
    place = {"diffusers": "tokenizer", "wan": "google/umt5-xxl", "comfyui": "."}[layout]
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / place / "tokenizer.json").write_text(tokenizer, "utf-8")
    if layout == "diffusers":
        shift = {"wan2.2-ti2v-5b": 5.0, "wan2.2-i2v-a14b": 5.0, "wan2.2-t2v-a14b": 12.0}.get(config.name, 3.0)
        _json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | {"flow_shift": shift})
        if index := index_of(config):
            _json(folder / "model_index.json", index)
        if config.concept.given == "grids":
            _json(folder / "config.json", layouts.bernini_config(config.boundary))


def index_of(config: ModelConfig) -> dict[str, Any]:
    """What model_index.json must say of a base of these sizes; nothing of Wan2.1's."""
    boundary = getattr(config, "boundary", None)
    own = boundary is not None and config.concept.given != "grids"  # whose own file says it
    found: dict[str, Any] = {"boundary_ratio": boundary} if own else {}
    if config.concept.given == "behind" and config.concept.fewest is None:
        found["_class_name"] = PHANTOM
    return found | ({"expand_timesteps": True} if config.concept.given == "clean" else {})


def name_of(config: ModelConfig) -> dict[str, str]:
    """What a transformer's config.json must say beside its sizes: of MAGREF what it is called."""
    return {"_name_or_path": "MAGREF-Video/MAGREF"} if config.concept.given == "canvas" else {}


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
    own = {"references": A2_TRANSFORMER, "control": "WanVACETransformer3DModel"}
    v3 = config.concept.fewest is not None
    return V3_TRANSFORMERS[0] if v3 else own.get(config.concept.given, "WanTransformer3DModel")


def _json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1), "utf-8")


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.named_parameters()}


@dataclasses.dataclass
class _Writer:
    """Draws the tensors of one part after another and writes them in one of LAYOUTS."""

    config: ModelConfig
    folder: Path
    layout: str
    bits: str | None
    g: torch.Generator
    writers: int

    def write(self, part: Part) -> None:
        """The files of one part."""
        if self.layout == "diffusers":
            _json(self.folder / part.name / "config.json", part.values)
            self._shards(self.folder / part.name, "model", part, self._dtype(part), lambda name: name)
        elif self.layout == "wan" and part.name == "transformer" and self.config.concept.given == "behind":
            # Phantom's own: without a configuration, of 1.3B one file, as `conceptmaster convert` makes it
            if "14b" not in self.config.name:
                self._file(part)
            else:
                self._shards(self.folder, "Phantom_Wan_14B", part, self._dtype(part), layouts.wan_transformer)
        elif self.layout == "wan" and part.name.startswith("transformer"):
            folder = self.folder
            if getattr(self.config, "boundary", None) is not None:
                folder /= "low_noise_model" if part.name == "transformer_2" else "high_noise_model"
            _json(folder / "config.json", layouts.wan_config(part.values, _model_type(self.config)))
            rename, stem = layouts.wan_transformer, "diffusion_pytorch_model"
            self._shards(folder, stem, part, self._dtype(part), rename)
        else:
            self._file(part)

    def _file(self, part: Part) -> None:
        """All of a part in one file, tensor by tensor; of a CLIP in Wan's own layout, all at once."""
        own = self.layout == "wan"
        path = self.folder / (_wan_file(part, self.config) if own else _comfyui_file(part, self.config))
        if own and part.name == "image_encoder":
            save_file(layouts.wan_clip(dict(self._tensors(part, lambda name: name))), path)
            return
        rename = _names(part, own, self.config)
        tensors = ((rename(name), tensor) for name, tensor in self._tensors(part, str))
        if self.bits not in (None, *BITS) and part.name.startswith("transformer"):
            layouts.write_gguf(path.with_suffix(".gguf"), tensors, str(self.bits))
            return
        eight_bits = {"fp8": layouts.plain_fp8, "fp8-scaled": layouts.scaled_fp8}.get(self.bits or "")
        with layouts.SafetensorsFile(path, 400 * len(part.shapes) + 1000) as file:
            for name, tensor in tensors:
                if eight_bits is None or part.name in ("vae", "image_encoder"):
                    file.add(name, tensor)
                    continue
                for key, value in eight_bits(name, tensor):
                    file.add(key, value)
            if self.bits == "fp8-scaled" and part.name not in ("vae", "image_encoder"):
                prefix = PREFIX if part.name.startswith("transformer") else ""
                file.add(f"{prefix}scaled_fp8", torch.empty(0, dtype=layouts.FP8))

    def _dtype(self, part: Part) -> torch.dtype:
        """Of a part's file."""
        named = {"float16": torch.float16, "bfloat16": torch.bfloat16}
        return named.get(self.bits or "", part.dtype) if part.name.startswith("transformer") else part.dtype

    def _tensors(self, part: Part, rename: Callable[[str], str]) -> Iterator[tuple[str, Tensor]]:
        """Each tensor, drawn."""
        dtype = self._dtype(part)
        for name, shape in part.shapes.items():
            yield rename(name), _draw(name, shape, self.g).to(dtype).cpu()

    def _shards(
        self, folder: Path, stem: str, part: Part, dtype: torch.dtype, rename: Callable[[str], str]
    ) -> None:
        """Files of SHARD bytes and an index."""
        shard: dict[str, Tensor] = {}
        files: dict[str, str] = {}
        with ThreadPoolExecutor(self.writers) as pool:
            writing: list[Future[None]] = []
            final = rename(list(part.shapes)[-1])
            for name, tensor in self._tensors(part, rename):
                shard[name] = tensor
                if name == final or sum(tensor.nbytes for tensor in shard.values()) >= SHARD:
                    file = f"{stem}-{len(set(files.values())):05}.safetensors"
                    files |= dict.fromkeys(shard, file)
                    if len(writing) >= self.writers:
                        writing[-self.writers].result()  # so that no more files are in memory
                    writing.append(pool.submit(save_file, shard, folder / file))
                    shard = {}
            for file_written in writing:
                file_written.result()
        _json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": files})


def _names(part: Part, own: bool, config: ModelConfig) -> Callable[[str], str]:
    """How a single file names the tensors of a part."""
    if part.name.startswith("transformer"):
        return lambda name: ("" if own else PREFIX) + layouts.wan_transformer(name)
    if part.name == "vae":
        return layouts.wan_vae(config.vae)
    return layouts.wan_text_encoder if own and part.name == "text_encoder" else str


def _model_type(config: ModelConfig) -> str:
    """What Wan's own config.json calls the kind of model."""
    given = config.concept.given
    kinds = {"none": "t2v", "grids": "t2v", "first_last": "flf2v", "clean": "ti2v", "control": "vace"}
    return kinds.get(given, "i2v")


def _wan_file(part: Part, config: ModelConfig) -> str:
    """The file of a part in Wan's own folder, as `conceptmaster convert` makes it of Wan's pickle."""
    vae = "Wan2.2_VAE" if config.vae["z_dim"] == 48 else "Wan2.1_VAE"
    clip = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
    stems = {"vae": vae, "text_encoder": "models_t5_umt5-xxl-enc-bf16", "image_encoder": clip}
    stems["transformer"] = "Phantom-Wan-1.3B"
    return f"{stems[part.name]}.safetensors"


def _comfyui_file(part: Part, config: ModelConfig) -> str:
    """The file of a part in ComfyUI's folder of models."""
    expert = {"transformer": "_high_noise", "transformer_2": "_low_noise"}.get(part.name, "")
    expert = expert if getattr(config, "boundary", None) is not None else ""
    places = {
        "vae": "vae/wan2.2_vae" if config.vae["z_dim"] == 48 else "vae/wan_2.1_vae",
        "text_encoder": "text_encoders/umt5_xxl",
        "image_encoder": "clip_vision/clip_vision_h",
    }
    return f"{places.get(part.name, f'diffusion_models/{config.name}{expert}')}.safetensors"


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
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    parser.add_argument(
        "--bits", metavar="B", help=f"of the transformer: {', '.join(BITS)}, or a kind of GGUF such as Q8_0"
    )
    args = parser.parse_args()
    config = like_a2(preset(args.name)) if args.a2 else preset(args.name)
    if args.layout != "comfyui" and args.bits not in (None, "float16", "bfloat16"):
        parser.error(f"--bits {args.bits} is for --layout comfyui")
    if config.concept.fewest is not None and args.layout != "diffusers":
        parser.error("SkyReels-V3 is told by its configuration: --layout diffusers")
    if args.layers:
        vace = config.transformer.vace_layers
        vace = None if vace is None else tuple(layer for layer in vace if layer < args.layers)
        transformer = dataclasses.replace(config.transformer, num_layers=args.layers, vace_layers=vace)
        config = dataclasses.replace(config, transformer=transformer)
    if args.text_layers:
        text_encoder = config.text_encoder | {"num_layers": args.text_layers}
        config = dataclasses.replace(config, text_encoder=text_encoder)
    write_base(config, args.folder, layout=args.layout, bits=args.bits)
    if args.adapter:
        write_adapter(config, args.adapter)


if __name__ == "__main__":
    main()
