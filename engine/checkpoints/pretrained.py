"""Whole models that others trained, in transformers' layout: those that judge videos, find things, caption.

None ships with this project: a user names a folder or a model of the Hub. Its config.json says what it is
before anything else is read or fetched; code that came with it is never run, and weights are safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import WeightsError, how_to_install, memory_errors, not_loaded
from ...hashed import sha256_files
from .hub import HUB_ID, snapshot
from .safetensors_io import check_file, refuse_pickle, some
from .weight_files import listed, read_index, read_json

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BESIDE = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Configurations and tokenizers, without weights."""
NOT_TAKEN = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation", "torch_dtype")
"""Entries of a config.json that could fetch or run code, or decide what the caller does."""


@dataclass(frozen=True)
class Pretrained:
    """One model, open. place: as it was asked for; kind: its config's model_type; model: in evaluation,
    frozen; files: SHA-256 by file of its configuration and weights."""

    place: str
    folder: Path
    kind: str
    model: Any
    files: Mapping[str, str]

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.model.parameters()).device

    def tokenizer(self) -> Any:
        """Its tokenizer. Raises WeightsError."""
        return self._part("AutoTokenizer", "tokenizer.json, or what AutoTokenizer's save_pretrained writes")

    def image_processor(self) -> Any:
        """What makes its input of pictures, on Pillow: torchvision is not needed. Raises WeightsError."""
        return self._part("AutoImageProcessor", "preprocessor_config.json", backend="pil")

    def processor(self) -> Any:
        """Both in one, for models of pictures and text. Raises WeightsError."""
        return self._part("AutoProcessor", "preprocessor_config.json and a tokenizer", backend="pil")

    def _part(self, name: str, needs: str, **options: Any) -> Any:
        reader = getattr(_transformers(), name)
        try:
            return reader.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True, **options
            )
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise WeightsError(f"{self.place} needs {needs} beside its weights: {reason:.300}") from error

    def told(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"place": self.place, "kind": self.kind, "files": dict(self.files)}


def kind_of(place: str | Path, revision: str | None = None) -> str:
    """What a model is, by its config.json's model_type ("clip"), before its weights are read or fetched.

    Raises: as `open_pretrained`.
    """
    return _kind(_folder(place, revision, [CONFIG]), place)


def open_pretrained(
    place: str | Path,
    kinds: Mapping[str, str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Pretrained:
    """A model in a folder as `save_pretrained` writes it, or of the Hub.

    Args: place: a path, or OWNER/NAME of the Hub where no folder has that path; kinds: the model types that
        will do, each with its class in transformers ({"clip": "CLIPModel"}); revision: of the Hub.
    Raises: WeightsError, one line: nothing there, another kind of model (named), no safetensors, weights that
        are missing or do not fit; MissingDependency without transformers.
    """
    kind = check_kind(place, kinds, revision)
    folder, names = _files(place, revision)
    model = _loaded(folder, str(place), kind, kinds[kind], dtype)
    return Pretrained(str(place), folder, kind, model.to(device), sha256_files(folder, names))


def hashes_of(place: str | Path, kinds: Mapping[str, str], revision: str | None = None) -> dict[str, str]:
    """SHA-256 by file of a model's configuration and weights, which are not opened: whether it is the same
    one as before. Raises: as `open_pretrained`."""
    check_kind(place, kinds, revision)
    folder, names = _files(place, revision)
    return sha256_files(folder, names)


def check_kind(place: str | Path, kinds: Mapping[str, str], revision: str | None = None) -> str:
    """The kind of the model at `place`, which must be one of `kinds`: to be asked before expensive work.

    Raises: as `open_pretrained`.
    """
    kind = kind_of(place, revision)
    if kind not in kinds:
        raise WeightsError(
            f"{place} is a model of the kind {kind!r:.60}: {' or '.join(kinds)} is needed here"
        )
    return kind


def _folder(place: str | Path, revision: str | None, wanted: list[str]) -> Path:
    path = Path(place)
    try:
        if path.is_dir():
            if revision is not None:
                raise WeightsError(f"{path} is a folder: a revision is one of the Hugging Face Hub")
            return path
        there = path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        there = False
    if there:
        raise WeightsError(f"{path} is a file: give the folder that has its {CONFIG}")
    if not HUB_ID.fullmatch(str(place)):
        raise WeightsError(f"no folder at {str(place)!r:.200}, and no OWNER/NAME of the Hugging Face Hub")
    return snapshot(str(place), revision, wanted)


def _files(place: str | Path, revision: str | None) -> tuple[Path, list[str]]:
    """A model's folder, fetched if need be, and its configuration and weights there."""
    folder = _folder(place, revision, [*BESIDE, WEIGHTS, "model-*.safetensors"])
    return folder, [CONFIG, *_weights(folder, place)]


def _kind(folder: Path, place: str | Path) -> str:
    if not (folder / CONFIG).is_file():
        instead = " (it is in diffusers' layout)" if (folder / "model_index.json").is_file() else ""
        raise WeightsError(f"{place} has no {CONFIG}: it is no model in transformers' layout{instead}")
    kind = read_json(folder / CONFIG).get("model_type")
    if not isinstance(kind, str) or not kind:
        raise WeightsError(f"{folder / CONFIG} does not say what the model is: it has no model_type")
    return kind


def _weights(folder: Path, place: str | Path) -> list[str]:
    """The files of the weights, whose headers are sound."""
    if (folder / INDEX).is_file():
        names = sorted(read_index(folder / INDEX))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        for path in listed(folder, "*.*"):
            refuse_pickle(path)
        raise WeightsError(f"{place} has no {WEIGHTS}: weights are safetensors here")
    for name in names:
        try:
            check_file(folder / name)
        except FileNotFoundError as error:
            raise WeightsError(str(error)) from error
    return names


def _loaded(folder: Path, place: str, kind: str, name: str, dtype: torch.dtype) -> Any:
    transformers = _transformers()
    cls = getattr(transformers, name)
    config = cls.config_class
    try:
        values = _taken(read_json(folder / CONFIG))
        if config.model_type != kind:  # SAM 2's videos: their configuration has what the picture's one has
            values = values | {"model_type": config.model_type}
        with memory_errors("a model was read"):
            model, found = cls.from_pretrained(
                folder,
                config=config.from_dict(values),
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, WeightsError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{place} does not load as {name}: {reason:.300}") from error
    if missing := sorted(found["missing_keys"]):
        raise WeightsError(f"{place} lacks weights of {name}: {some(missing)}")
    return model.eval().requires_grad_(False)


def _taken(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, and those in it, without NOT_TAKEN."""
    return {
        name: _taken(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in NOT_TAKEN
    }


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise not_loaded("transformers", how_to_install("export"), error) from error
    return transformers
