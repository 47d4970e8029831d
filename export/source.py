"""What a bundle is made from: a folder with trained weights, or a preset with random ones."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from torch import nn

from ..engine.config import ConfigError, ModelConfig, preset
from ..engine.model import ConceptMaster
from ..engine.vae import build_vae
from ..engine.weights import WeightsError, load, load_model, load_strict
from ..runtime.manifest import Defaults
from .errors import ExportError

if TYPE_CHECKING:
    from ..engine.vae import VAE

PRESET = "preset:"
FILES = ("model.safetensors", "vae.safetensors", "tokenizer.json")
PAD, END = 0, 1  # token ids: the runtime pads with PAD, the tokenizer appends END
DEFAULTS = Defaults(solver="unipc", steps=20, shift=3.0, guidance=2.5)


@dataclass(frozen=True)
class Source:
    """Model and VAE in evaluation mode on the CPU, the text of tokenizer.json, and a request's defaults."""

    model: ConceptMaster
    vae: VAE
    tokenizer: str
    defaults: Defaults = DEFAULTS


def open_source(place: str | Path) -> Source:
    """Loads a source.

    Args: place: a folder with model.safetensors (as `save_model` writes it, the configuration inside),
        vae.safetensors, tokenizer.json and, if it likes, defaults.json (fields of `Defaults`); or
        "preset:NAME" for random weights.
    Raises: ExportError, one line, for whatever is missing or does not fit.
    """
    if str(place).startswith(PRESET):
        try:
            return random_source(preset(str(place).removeprefix(PRESET)))
        except ConfigError as error:
            raise ExportError(str(error)) from error
    folder = Path(place)
    if not folder.is_dir():
        raise ExportError(f"no weights at {str(folder)!r}: neither a folder nor {PRESET}NAME")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ExportError(f"{str(folder)!r} lacks {', '.join(missing)}")
    try:
        model = load_model(folder / FILES[0])
        vae = build_vae(model.config)
        load_strict(vae, load(folder / FILES[1])[0])
    except WeightsError as error:
        raise ExportError(f"{str(folder)!r}: {error}") from error
    tokenizer = _read(folder / FILES[2])
    _check_tokenizer(tokenizer, model.config.text_encoder["vocab_size"], folder / FILES[2])
    return Source(model, vae, tokenizer, _defaults(folder / "defaults.json"))


def random_source(config: ModelConfig, seed: int = 0) -> Source:
    """A model with random weights and a tokenizer of bytes: to try things, its videos mean nothing.

    Layers that begin at zero are drawn too, so that every part of the model shows in its output.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, vae = ConceptMaster(config).eval(), build_vae(config)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return Source(model, vae, byte_tokenizer(config.text_encoder["vocab_size"]))


def byte_tokenizer(vocabulary: int) -> str:
    """A tokenizer.json that knows every byte and no word: pad 0, end 1, then the 256 bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    entries = {"<pad>": PAD, "</s>": END} | {byte: 2 + i for i, byte in enumerate(alphabet)}
    if len(entries) > vocabulary:
        raise ExportError(f"a tokenizer of bytes needs {len(entries)} entries, the model has {vocabulary}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(entries, []))
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", END)]
    )
    return tokenizer.to_str(pretty=True)


def _check_tokenizer(text: str, vocabulary: int, path: Path) -> None:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise ExportError(f"{str(path)!r} is not a tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > vocabulary:
        size = tokenizer.get_vocab_size()
        raise ExportError(f"{str(path)!r} has {size} entries, the model's text encoder knows {vocabulary}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.encode("a").ids[-1:] != [END]:
        raise ExportError(f"{str(path)!r} must end every text with the token {END}")


def _defaults(path: Path) -> Defaults:
    if not path.is_file():
        return DEFAULTS
    try:
        given: Any = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ExportError(f"{str(path)!r} is not JSON: {error}") from error
    known = {field.name for field in dataclasses.fields(Defaults)}
    if not isinstance(given, dict) or set(given) - known:
        raise ExportError(f"{str(path)!r} must be an object with entries out of {', '.join(sorted(known))}")
    try:
        return dataclasses.replace(DEFAULTS, **given)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{str(path)!r}: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(f"{str(path)!r} is not UTF-8 text") from error
