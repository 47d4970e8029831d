"""What a bundle is made from: trained weights, a base in diffusers' layout, or a preset with random ones."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from torch import nn

from ..engine.checkpoints.adapter import check_base, load_adapter, read_adapter
from ..engine.checkpoints.diffusers_folder import HUB_ID, is_folder, locate
from ..engine.checkpoints.lora import merge_lora
from ..engine.checkpoints.safetensors_io import load, load_model, load_strict, refuse_pickle
from ..engine.checkpoints.wan import load_base, load_base_vae, read_config, read_sampling
from ..engine.config import ModelConfig
from ..engine.model import ConceptMaster
from ..engine.presets import preset
from ..engine.vae.wan_decoder import build_vae
from ..errors import ConfigError, InputError, WeightsError
from ..runtime.bundle_format.schema import Defaults

if TYPE_CHECKING:
    from ..engine.vae.wan_decoder import VAE

PRESET = "preset:"
FILES = ("model.safetensors", "vae.safetensors", "tokenizer.json")
PAD, END = 0, 1  # token ids: the runtime pads with PAD, the tokenizer appends END
DEFAULTS = Defaults(solver="unipc", steps=20, shift=3.0, guidance=2.5)
# Of bases: what diffusers' WanPipeline does when it is told nothing.
BASE_SIZE, BASE_FRAMES, BASE_STEPS, BASE_GUIDANCE = (832, 480), 81, 50, 5.0


@dataclass(frozen=True)
class Source:
    """Model and VAE in evaluation mode on the CPU, the text of tokenizer.json, and a request's defaults."""

    model: ConceptMaster
    vae: VAE
    tokenizer: str
    defaults: Defaults = DEFAULTS


@dataclass(frozen=True)
class Choices:
    """What a base leaves open; None is its default. Trained weights and presets leave nothing open.

    size: width and height in pixels; frames: of the video; adapter: a file of `save_adapter`; revision: a
    branch, tag or commit of a model in the Hugging Face Hub; lora: a file that is merged into the
    transformer, lora_scale (1) times.
    """

    size: tuple[int, int] | None = None
    frames: int | None = None
    adapter: Path | None = None
    revision: str | None = None
    lora: Path | None = None
    lora_scale: float | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a scale of nothing."""
        if self.lora_scale is not None and self.lora is None:
            raise InputError("a scale without a LoRA: --lora FILE says which")


def is_base(place: str | Path) -> bool:
    """Whether `place` is a folder in diffusers' layout, or the name of one in the Hugging Face Hub."""
    path = Path(place)
    return is_folder(path) or (not path.exists() and HUB_ID.fullmatch(str(place)) is not None)


def open_source(place: str | Path, choices: Choices | None = None) -> Source:
    """Loads a source.

    Args: place: a folder with model.safetensors (as `save_model` writes it, the configuration inside),
        vae.safetensors, tokenizer.json and, if it likes, defaults.json (fields of `Defaults`); a base (see
        `is_base`); or "preset:NAME" for random weights. choices: for a base.
    Raises: InputError, one line, for whatever is missing or does not fit.
    """
    choices = choices or Choices()
    if is_base(place):
        return _base_source(place, choices)
    if choices != Choices():
        raise InputError(
            f"{str(place)!r} is no base in diffusers' layout: size, frames, adapter, lora, revision are for "
            "those"
        )
    if str(place).startswith(PRESET):
        try:
            return random_source(preset(str(place).removeprefix(PRESET)))
        except ConfigError as error:
            raise InputError(str(error)) from error
    folder = Path(place)
    _check_folder(folder)
    try:
        model = load_model(folder / FILES[0])
        vae = build_vae(model.config)
        load_strict(vae, load(folder / FILES[1])[0])
    except WeightsError as error:
        raise InputError(f"{str(folder)!r}: {error}") from error
    tokenizer = _read(folder / FILES[2])
    _check_tokenizer(tokenizer, model.config.text_encoder["vocab_size"], folder / FILES[2])
    return Source(model, vae, tokenizer, _defaults(folder / "defaults.json"))


def _check_folder(folder: Path) -> None:
    """Refuses what is no folder with FILES."""
    try:
        if not folder.is_dir():
            refuse_pickle(folder)
            raise InputError(f"no weights at {str(folder)!r}: neither a folder nor {PRESET}NAME")
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            for path in sorted(folder.iterdir()):
                refuse_pickle(path)
            raise InputError(
                f"{str(folder)!r} lacks {', '.join(missing)}, and for diffusers' layout transformer/"
            )
    except WeightsError as error:
        raise InputError(str(error)) from error


def _base_source(place: str | Path, choices: Choices) -> Source:
    """A base, a LoRA merged, with the adapter that was chosen or a new one, which changes nothing."""
    name = Path(place).resolve().name if Path(place).exists() else str(place).partition("/")[2]
    try:
        folder = locate(place, choices.revision)
        adapter = None if choices.adapter is None else read_adapter(choices.adapter)
        config = read_config(
            folder,
            name,
            choices.size or BASE_SIZE,
            BASE_FRAMES if choices.frames is None else choices.frames,
            adapter.concept if adapter else None,
        )
        if adapter:
            check_base(adapter, config)  # before gigabytes are read
        sampling = read_sampling(folder)
        defaults = Defaults(sampling.solver, BASE_STEPS, sampling.shift, BASE_GUIDANCE)
        path = folder / "tokenizer" / "tokenizer.json"
        if not path.is_file():
            raise WeightsError(f"{path} is missing: transformers' AutoTokenizer saves it")
        tokenizer = _read(path)
        _check_tokenizer(tokenizer, config.text_encoder["vocab_size"], path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a new adapter is the same each time, so that a bundle can be verified
            model = load_base(folder, config)
        if choices.lora is not None:
            merge_lora(
                model.transformer, choices.lora, 1.0 if choices.lora_scale is None else choices.lora_scale
            )
        if adapter:
            load_adapter(model, adapter)
        return Source(model, load_base_vae(folder, config), tokenizer, defaults)
    except (ValueError, FileNotFoundError, ImportError) as error:  # WeightsError, ConfigError: ValueErrors
        raise InputError(str(error)) from error


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
        raise InputError(f"a tokenizer of bytes needs {len(entries)} entries, the model has {vocabulary}")
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
        raise InputError(f"{str(path)!r} is not a tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > vocabulary:
        size = tokenizer.get_vocab_size()
        raise InputError(f"{str(path)!r} has {size} entries, the model's text encoder knows {vocabulary}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.encode("a").ids[-1:] != [END]:
        raise InputError(f"{str(path)!r} must end every text with the token {END}")


def _defaults(path: Path) -> Defaults:
    if not path.is_file():
        return DEFAULTS
    try:
        given: Any = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}") from error
    known = {field.name for field in dataclasses.fields(Defaults)}
    if not isinstance(given, dict) or set(given) - known:
        raise InputError(f"{str(path)!r} must be an object with entries out of {', '.join(sorted(known))}")
    try:
        return dataclasses.replace(DEFAULTS, **given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{str(path)!r}: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 text") from error
