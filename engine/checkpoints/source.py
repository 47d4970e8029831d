"""Weights as people have them, opened: the one way in for exporter, verifier, torch backend and benchmarks.

A place is a folder that training wrote (model.safetensors, vae.safetensors, tokenizer.json), a base, or
"preset:NAME" for random weights. A base is a folder in diffusers' layout, on this machine or in the Hugging
Face Hub, Wan's original folder, or files as ComfyUI has them. It leaves open what `Choices` says. What was
read is told by its SHA-256 (`Origin`), so that the same weights can be known again.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers
import torch
from torch import nn

from ...delta_file import Delta, read_delta
from ...errors import ConfigError, InputError, WeightsError, memory_errors
from ...hashed import identities, require_same, sha256_file, sha256_files
from ...tokenizer_file import encode, parse_tokenizer, read_tokenizer
from ..checked import check_types
from ..config import ModelConfig
from ..model import ConceptMaster
from ..presets import preset
from ..sampling import Sampling
from ..vae.wan_decoder import build_vae
from .adapter import check_base, load_adapter, read_adapter
from .deltas import merge_deltas
from .diffusers_folder import locate
from .hub import HUB_ID
from .lora import merge_lora
from .releases import release_of
from .safetensors_io import built, load, load_model
from .single_files import open_base, read_spiece
from .wan import load_base, load_base_vae, read_config, read_sampling
from .wan_references import told
from .weight_files import read_json

if TYPE_CHECKING:
    from ..vae.wan_decoder import VAE

log = logging.getLogger(__name__)

PRESET = "preset:"
FIRST, SECOND = "transformer", "transformer_2"  # of two, for high noise and for low
FILES = ("model.safetensors", "vae.safetensors", "tokenizer.json")
DEFAULTS = "defaults.json"
TOLD = {"vocabulary": "vocabulary.json", "ranges": "ranges.json"}
"""What a trained folder may tell of its model, by the bundle's manifest, which holds the same."""
PAD, END = 0, 1  # token ids: the runtime pads with PAD, the tokenizer appends END
SAMPLING = Sampling(solver="unipc", shift=3.0, steps=20, guidance=2.5)
HUB_URL = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(?:/tree/([^/?#]+))?.*")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that is merged into a transformer: its file, and what it is multiplied with; None is 1.

    partial: without what the transformer has no modules for; expert: the name of the transformer, of two.
    """

    path: Path
    scale: float | None = None
    partial: bool = False
    expert: str = FIRST

    @property
    def factor(self) -> float:
        """What the LoRA is multiplied with."""
        return 1.0 if self.scale is None else self.scale


class LoraOrigin(NamedTuple):
    """A LoRA that was merged, by its file's name and SHA-256; the rest as of `LoraFile`, but `partial`:
    something was left out."""

    name: str
    sha256: str
    scale: float
    partial: bool = False
    expert: str = FIRST


@dataclass(frozen=True)
class Choices:
    """What a base leaves open; None is its default. Trained weights and presets leave nothing open but what
    is merged: LoRAs and deltas.

    size: width and height in pixels; frames: of the video; references: how many pictures each request of a
    VACE or a Phantom has, or a Bernini-R at most; reference_side: pixels that the longer side of a picture of
    the last has at most; adapter: a file of `save_adapter`; revision: a
    branch, tag or commit of a model in the Hugging Face Hub; loras: merged into the transformer one after the
    other; parts: files, or folders with shards, of base.PARTS, which replace those of the place; tokenizer: a
    tokenizer.json or a SentencePiece model, which replaces that of the place; custom: deltas (delta_file.py),
    merged after the LoRAs.
    """

    size: tuple[int, int] | None = None
    frames: int | None = None
    adapter: Path | None = None
    revision: str | None = None
    loras: tuple[LoraFile, ...] = ()
    parts: Mapping[str, Path] = field(default_factory=dict)
    tokenizer: Path | None = None
    references: int | None = None
    reference_side: int | None = None
    custom: tuple[Path, ...] = ()

    @property
    def merged(self) -> Choices:
        """What is merged into any model, alone."""
        return Choices(loras=self.loras, custom=self.custom)


@dataclass(frozen=True)
class Origin:
    """What a source was read from.

    name: of the folder, of the model in the Hugging Face Hub, or preset:NAME; files: SHA-256 by path below
    it, or by name where a file lay elsewhere; commit: of the Hub; adapter: name and SHA-256.
    """

    name: str
    files: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    adapter: tuple[str, str] | None = None
    loras: tuple[LoraOrigin, ...] = ()
    custom: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Source:
    """Model and VAE in evaluation mode on the CPU, the text of tokenizer.json, how it is meant to be sampled,
    what it was read from, and what it tells of itself: of each of TOLD that is there, the parsed file."""

    model: ConceptMaster
    vae: VAE
    tokenizer: str
    sampling: Sampling
    origin: Origin
    told: Mapping[str, Any] = field(default_factory=dict)


def loras_of(
    paths: Iterable[str | os.PathLike[str]],
    scales: tuple[float, ...],
    partial: bool = False,
    expert: str = FIRST,
) -> tuple[LoraFile, ...]:
    """One transformer's files and scales as the command line has them, in order: a scale each, or none for
    any, which is 1.

    Raises: InputError for another number of scales, and for one that is not finite.
    """
    paths, option = list(paths), "--lora" if expert == FIRST else "--lora-2"
    if scales and not paths:
        raise InputError(f"a scale without a LoRA: {option} FILE says which")
    if scales and len(scales) != len(paths):
        raise InputError(
            f"{len(paths)} {option} and {len(scales)} {option}-scale: give a scale for each, in order, or "
            "none"
        )
    if not all(math.isfinite(scale) for scale in scales):
        raise InputError("the scale of a LoRA must be a finite number")
    each = zip(paths, scales or (None,) * len(paths), strict=True)
    return tuple(LoraFile(Path(path), scale, partial, expert) for path, scale in each)


def is_base(place: str | Path) -> bool:
    """Whether `place` is a base, in whatever layout, or the name of one in the Hugging Face Hub."""
    place, _ = _address(place)
    if str(place).startswith(PRESET):
        return False
    if _exists(place):
        return not (Path(place) / FILES[0]).exists()
    return HUB_ID.fullmatch(str(place)) is not None


def _exists(place: str | Path) -> bool:
    try:
        return Path(place).exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def open_source(
    place: str | Path | None, choices: Choices | None = None, tokenizer: Path | None = None
) -> Source:
    """Loads a source, see the module's text.

    Args: place: a folder, a file, OWNER/NAME or the address of a model in the Hugging Face Hub, or
        preset:NAME; None where `choices` says where every part is; a trained folder may have a defaults.json
        with fields of `Sampling`, and the files of TOLD. choices: for a base. tokenizer: a tokenizer.json for
        places that have none.
    Raises: InputError, one line, for whatever is missing, does not fit, or is of a layout that is not read.
    """
    choices = choices or Choices()
    if place is None:
        if "transformer" not in choices.parts:
            raise InputError(
                "say what to open: a folder, OWNER/NAME of the Hub, or files from --transformer on"
            )
        place = choices.parts["transformer"]
    place, revision = _address(place)
    if revision is not None:
        choices = dataclasses.replace(choices, revision=choices.revision or revision)
    try:
        with memory_errors("weights were read"):
            deltas = [read_delta(path) for path in choices.custom]
            before = identities([*(lora.path for lora in choices.loras), *choices.custom])
            source = _merged(_opened(place, choices, tokenizer), choices.loras, deltas)
            require_same(before)
            return source
    except InputError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise InputError(str(error)) from error


def _opened(place: str | Path, choices: Choices, tokenizer: Path | None) -> Source:
    """A source with nothing merged yet, into which the LoRAs that were chosen can be."""
    if is_base(place):
        return _open_base(place, choices, tokenizer)
    random = str(place).startswith(PRESET)
    if not random and not _exists(place):
        raise InputError(
            f"there is nothing at {str(place)!r:.200}: give a folder, preset:NAME, or OWNER/NAME of the Hub"
        )
    _no_choices(place, choices)
    if random:
        source = random_source(preset(str(place).removeprefix(PRESET)))
        source = dataclasses.replace(source, origin=Origin(str(place)))
    else:
        source = _open_trained(Path(place), tokenizer)
    _check_experts(choices.loras, source.model.config, place)
    return source


def _merged(source: Source, loras: tuple[LoraFile, ...], deltas: list[Delta]) -> Source:
    """A source with LoRAs, then deltas merged into its model, which changes."""
    model, text, origins = source.model, source.tokenizer, []
    for lora in loras:
        report = merge_lora(model.experts()[lora.expert], lora.path, lora.factor, lora.partial)
        log.log(logging.WARNING if report.left_out else logging.INFO, "%s", report)
        digest, in_part = sha256_file(lora.path), bool(report.left_out)
        origins.append(LoraOrigin(lora.path.name, digest, lora.factor, in_part, lora.expert))
    if deltas:
        text = merge_deltas(model, text, deltas)
    custom = tuple((delta.path.name, sha256_file(delta.path)) for delta in deltas)
    origin = dataclasses.replace(source.origin, loras=tuple(origins), custom=custom)
    return dataclasses.replace(source, tokenizer=text, origin=origin)


def _address(place: str | Path) -> tuple[str | Path, str | None]:
    """A place without what a shell or a browser puts around it, and the revision that an address has."""
    if (address := HUB_URL.fullmatch(str(place))) is not None:
        return address[1], address[2]
    return (place.rstrip("/") or place if isinstance(place, str) else place), None


def _no_choices(place: str | Path, choices: Choices) -> None:
    if choices != choices.merged:
        raise InputError(
            f"{str(place)!r} is no base: size, frames, adapter, revision and single parts are for those"
        )


def _open_trained(folder: Path, tokenizer: Path | None) -> Source:
    """What `save_model` wrote, the VAE and the tokenizer beside it."""
    needed = FILES if tokenizer is None else FILES[:2]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{str(folder)!r} lacks {', '.join(missing)}, and for diffusers' layout transformer/"
        )
    names = [name for name in (*FILES, DEFAULTS, *TOLD.values()) if (folder / name).is_file()]
    before = identities(folder / name for name in names)
    origin = Origin(folder.resolve().name, sha256_files(folder, names))
    model = load_model(folder / FILES[0])
    vae = built(build_vae, model.config, load(folder / FILES[1])[0], folder / FILES[1])
    text = _read_tokenizer(folder / FILES[2], tokenizer, model.config, folder)
    sampling = _sampling(folder / DEFAULTS)
    told = {kind: read_json(folder / name) for kind, name in TOLD.items() if name in names}
    require_same(before)
    return Source(model, vae, text, sampling, origin, told)


def _open_base(place: str | Path, choices: Choices, tokenizer: Path | None) -> Source:
    """A base with the adapter that was chosen or a new one, which changes nothing."""
    folder = locate(place, choices.revision)
    before = identities([] if choices.adapter is None else [choices.adapter])
    base = open_base(folder, choices.parts)
    if (given := choices.tokenizer) is not None:
        before |= identities([given])
        base = dataclasses.replace(base, tokenizer=given, files={**base.files, given.name: given})
    before |= base.held
    local = Path(place).exists()
    name = (folder.stem if folder.is_file() else folder.resolve().name) or "base"
    name = name if local else str(place).partition("/")[2]
    base = told(base, choices.references)
    release, adapter = release_of(base), None if choices.adapter is None else read_adapter(choices.adapter)
    config = read_config(
        base,
        name,
        choices.size or release.size,
        release.frames if choices.frames is None else choices.frames,
        adapter.concept if adapter else None,
        choices.references,
        choices.reference_side,
    )
    _check_experts(choices.loras, config, base.where)  # before gigabytes are read
    if adapter:
        check_base(adapter, config)
    sampling = read_sampling(base)
    text = _read_tokenizer(base.tokenizer, tokenizer, config, base.where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a new adapter is the same each time, so that a bundle can be made again
        model = load_base(base, config)
    if adapter:
        load_adapter(model, adapter)
    digests = sha256_files(Path(), {str(path) for path in base.files.values()})
    origin = Origin(
        name if local else str(place),
        {name: digests[str(path)] for name, path in base.files.items()},
        None if local else folder.name,  # of a snapshot, the commit
        None if adapter is None else (adapter.path.name, sha256_file(adapter.path)),
    )
    vae = load_base_vae(base, config)
    require_same(before)
    return Source(model, vae, text, sampling, origin)


def _check_experts(loras: tuple[LoraFile, ...], config: ModelConfig, where: Path | str) -> None:
    """Raises ConfigError for a LoRA of a second transformer that is not there; warns where there are two and
    only one gets any."""
    given = {lora.expert for lora in loras}
    if config.boundary is None and SECOND in given:
        raise ConfigError(f"{where} has one transformer: --lora-2 is for the second of two, take --lora")
    if config.boundary is not None and len(given) == 1:
        has, lacks = ("high", "--lora-2") if FIRST in given else ("low", "--lora")
        log.warning("the expert for %s noise alone gets a LoRA: %s is for the other one", has, lacks)


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
    tokenizer = byte_tokenizer(config.text_encoder["vocab_size"])
    return Source(model, vae, tokenizer, SAMPLING, Origin(config.name))


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


def _read_tokenizer(found: str | Path | None, instead: Path | None, config: ModelConfig, where: Path) -> str:
    """The text of the tokenizer.json that `found` is, or is the path of, or `instead`, which must fit the
    text encoder. Raises WeightsError."""
    if instead is not None and (found is None or (isinstance(found, Path) and not found.is_file())):
        found = instead
    if found is None:
        raise WeightsError(
            f"{where} has no tokenizer: give UMT5's tokenizer.json or spiece.model with --tokenizer FILE"
        )
    if isinstance(found, Path) and not found.exists():
        raise WeightsError(
            f"{found} is missing: transformers' AutoTokenizer saves it, or give one with --tokenizer"
        )
    known, told = config.text_encoder["vocab_size"], f"{str(found if isinstance(found, Path) else where)!r}"
    try:
        if isinstance(found, Path) and found.suffix == ".model":
            found = read_spiece(found)
        if isinstance(found, Path):
            tokenizer, text = read_tokenizer(found, known)
        else:
            tokenizer, text = parse_tokenizer(found.encode(), known)
        ids = encode(tokenizer, "a", known)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{told} has no tokenizer that is read: {error}") from error
    if ids[-1:] != (END,):
        raise WeightsError(f"{told} must end every text with the token {END}")
    return text


def _sampling(path: Path) -> Sampling:
    """SAMPLING, with what a defaults.json says. Raises InputError."""
    if not path.is_file():
        return SAMPLING
    given = read_json(path)
    known = {entry.name for entry in dataclasses.fields(Sampling)}
    if set(given) - known:
        raise InputError(f"{str(path)!r} must be an object with entries out of {', '.join(sorted(known))}")
    try:
        sampling = dataclasses.replace(SAMPLING, **given)
        check_types(sampling)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return sampling
