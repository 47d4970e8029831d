"""The weights of a bundle as PyTorch modules: found, loaded, and held to the bundle's own graphs.

A bundle holds ONNX graphs, whose weights have been transposed, folded and renamed. The torch backend loads
the safetensors that they were exported from: from the folder that it is told, from `weights/` inside the
bundle, or, for a bundle that comes with the package, from a folder examples/NAME/weights*. That they are the
bundle's is checked before anything runs: the configuration must be the manifest's, and the bytes of biases
and norms, which every training step changes and the exporter stores as they are, must be in the graphs.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ....engine.checkpoints.adapter import load_adapter
from ....engine.checkpoints.diffusers_folder import is_folder
from ....engine.checkpoints.safetensors_io import load, load_model, load_strict
from ....engine.checkpoints.wan import load_base, load_base_vae
from ....engine.config import ModelConfig
from ....engine.model import ConceptMaster
from ....engine.vae.wan_decoder import build_vae, streaming_decoders
from ....errors import BundleError, InputError
from ...bundle_format.find import SHIPPED, Bundle

if TYPE_CHECKING:
    from ....engine.vae.wan_decoder import VAE
    from .options import TorchOptions

MODEL, AUTOENCODER = "model.safetensors", "vae.safetensors"
INSIDE = "weights"
LEAST = 16
"""Elements of a vector that is looked for: enough to be no coincidence."""
LOOKED_FOR = 12
UNREAD = "image_encoder."
"""What no vector is taken from: a graph of CLIP may do without its last layer, whose output nothing reads."""
STORED = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that a graph may keep a vector in, where it loses nothing."""


class _AnotherModel(InputError):
    """Weights whose configuration is not the bundle's."""


def load_weights(bundle: Bundle, options: TorchOptions) -> tuple[ConceptMaster, VAE, Path]:
    """Model and video autoencoder of `bundle`, in evaluation mode and float32 on the CPU, and their folder.

    Raises: InputError where there are no weights, or another model's; BundleError for a damaged file.
    """
    config = ModelConfig.from_dict(bundle.manifest.model)
    if options.weights is not None:
        folder = Path(options.weights)
        model, vae = _load(folder, config, options)
        if not _are_of(bundle, model, vae):
            raise InputError(
                f"the weights in {str(folder)!r} are not those that the bundle "
                f"{str(bundle.folder)!r} was exported from"
            )
        return model, vae, folder
    for folder in _candidates(bundle):
        try:
            model, vae = _load(folder, config, options)
        except _AnotherModel:
            if folder.parent == bundle.folder:
                raise
            continue  # of another shipped bundle
        if _are_of(bundle, model, vae):
            return model, vae, folder
    raise InputError(
        f"the torch backend found no weights of the bundle {str(bundle.folder)!r}: give the folder that it "
        f"was exported from with --weights, or put its {MODEL} and {AUTOENCODER} into the bundle's {INSIDE}/"
    )


def count_weights(config: ModelConfig) -> dict[str, int]:
    """Elements by part, of a model that is not loaded yet."""
    with torch.device("meta"):
        model, vae = ConceptMaster(config), build_vae(config)
    found = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return found | {"vae": sum(p.numel() for p in vae.parameters())}


def _candidates(bundle: Bundle) -> Iterator[Path]:
    if (bundle.folder / INSIDE).is_dir():
        yield bundle.folder / INSIDE
    if bundle.folder.parent == SHIPPED:
        examples = SHIPPED.parents[1] / "examples" / bundle.manifest.name
        yield from (path.parent for path in sorted(examples.glob(f"{INSIDE}*/{MODEL}")))


def _load(folder: Path, config: ModelConfig, options: TorchOptions) -> tuple[ConceptMaster, VAE]:
    try:
        if is_folder(folder):
            model, vae = load_base(folder, config), load_base_vae(folder, config)
            if options.adapter is not None:
                load_adapter(model, Path(options.adapter))
            return model, vae
        if options.adapter is not None:
            raise InputError(f"{str(folder)!r} is no base in diffusers' layout: an adapter is for one")
        model, vae = load_model(folder / MODEL), build_vae(config)
        if model.config != config:
            raise _AnotherModel(f"the weights in {str(folder)!r} are of another model than the bundle")
        load_strict(vae, load(folder / AUTOENCODER)[0])
    except FileNotFoundError as error:
        raise InputError(f"{error}: weights are a folder with {MODEL} and {AUTOENCODER}") from None
    except InputError:
        raise
    except ValueError as error:  # WeightsError, ConfigError
        raise BundleError(f"the weights in {str(folder)!r} cannot be used: {error}") from error
    return model, vae


def _are_of(bundle: Bundle, model: ConceptMaster, vae: VAE) -> bool:
    """Whether the graphs hold the bytes of vectors, LOOKED_FOR of the model and of the decoder."""
    modules = (model, streaming_decoders(vae)[0])
    with ExitStack() as stack:
        maps = [stack.enter_context(_mapped(path)) for path in _files(bundle)]
        return all(
            any(content.find(needle) >= 0 for needle in needles for content in maps)
            for module in modules
            for needles in _needles(module)
        )


def _needles(module: torch.nn.Module) -> list[list[bytes]]:
    """Vectors, which no exporter transposes, as the bytes that they may be stored as."""
    tensors = [
        p.detach()
        for name, p in module.named_parameters()
        if p.dim() == 1 and p.numel() >= LEAST and p.unique().numel() > 1 and not name.startswith(UNREAD)
    ]
    step = max(1, len(tensors) // LOOKED_FOR)
    return [
        [tensor.to(dtype).view(torch.uint8).numpy().tobytes() for dtype in STORED]
        for tensor in tensors[::-1][::step]
    ]


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _files(bundle: Bundle) -> Iterator[Path]:
    for graph in bundle.manifest.graphs.values():
        for file in (graph.file, *(external.file for external in graph.external)):
            yield bundle.folder / file
