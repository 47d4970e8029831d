"""Parts that lie in files of their own: Wan's original folder, and what ComfyUI has.

Every file of weights in the folder, and in the folders below it that these layouts have, is told by its keys
(spellings.py), whatever it is called; only where there are two transformers their names say which is the
high-noise expert and which the low-noise one. A configuration beside a file (NAME.json, or config.json where
it is of this part; Wan's own or diffusers') is read, else it is derived from the shapes (derived.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import ConfigError, WeightsError
from ...hashed import Identity, identities
from ...untrusted import read_plain, shell_word
from .base import Base, Part
from .derived import VACE_CLASS, WANS, derive
from .diffusers_folder import is_folder, open_folder
from .gguf_file import read_gguf
from .lazy_weights import Stored
from .lora_names import read_key
from .releases import TI2V_CHANNELS, release_of
from .safetensors_io import PICKLES, refuse_pickle, some
from .spellings import as_diffusers, spelling_of, without_prefix
from .spiece import LARGEST, from_gguf, from_spiece
from .wan_experts import expert_named
from .wan_references import V3_TRANSFORMERS
from .weight_files import indices, listed, read_header, read_index, read_json, tensors_of

ORIGINAL, COMFYUI = "Wan's original layout", "ComfyUI's single files"
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
"""The folders of Wan2.2's two transformers in the original layout."""
BELOW = (*EXPERTS.values(), "diffusion_models", "unet", "text_encoders", "clip", "vae", "clip_vision")
ROOTS = ("", "models", "split_files")
TOKENIZERS = ("", "google/umt5-xxl", "tokenizer", "umt5-xxl")
"""Folders in which a tokenizer may lie; `split_files` is how Comfy-Org lays out its repositories."""
CONFIG, SPIECE = "config.json", "spiece_model"
WHOLE = ("first_stage_model.", "cond_stage_model.", "text_encoders.", "vae.", "conditioner.")
"""Before the names of what is no transformer in a file of all parts."""
MOST_TOLD = 4  # pickles whose conversion is told
OPTIONS = {
    "transformer": "--transformer",
    "transformer_2": "--transformer-2",
    "vae": "--vae",
    "text_encoder": "--text-encoder",
    "image_encoder": "--image-encoder",
}
"""The command line's names of the parts."""
SIZES = tuple(
    "in_channels out_channels ffn_dim num_layers text_dim z_dim base_dim dim_mult d_model d_ff vocab_size "
    "hidden_size num_hidden_layers".split()
)
"""What shapes and a config.json of the same part both tell."""


@dataclass(frozen=True)
class Weights:
    """The weights of one part, in one file or in shards.

    kind: which of base.PARTS; where: the file, or the shards' index; tensors: under diffusers' names; told:
    what a configuration beside them says, empty without; instead: one for where neither that nor the shapes
    tell it; files: all that were read; held: what these were before that; tokenizer: the text of a
    tokenizer.json that they hold, None without.
    """

    kind: str
    where: Path
    tensors: Mapping[str, Stored]
    told: Mapping[str, Any]
    instead: Mapping[str, Any] | None
    files: tuple[Path, ...]
    held: Mapping[Path, Identity]
    tokenizer: str | None = None

    @cached_property
    def part(self) -> Part:
        """The part. Raises ConfigError, one line, where nothing tells its configuration."""
        return Part(self._config(), self.tensors, self.where, self.files[-1] if self.told else self.where)

    def _config(self) -> Mapping[str, Any]:
        """`instead` where it is of the same sizes as the tensors tell, or they do not tell any."""
        if self.told or not self.instead:
            return derive(self.kind, self.tensors, self.where, self.told or None)
        try:
            found = derive(self.kind, self.tensors, self.where, None)
        except ConfigError:
            return self.instead
        same = all(self.instead.get(name, found[name]) == found[name] for name in SIZES if name in found)
        kinds = [values.get("_class_name") == VACE_CLASS for values in (self.instead, found)]
        same = same and kinds[0] == kinds[1]
        return self.instead if same else found

    @property
    def expert(self) -> str | None:
        """Which of two it is, as the name of the file or its folder tells, see wan_experts.py."""
        return expert_named(self.where, of_two=True)


def open_weights_at(path: Path, instead: Mapping[str, Any] | None = None) -> Weights:
    """The part that a file is, or a folder with shards.

    Args: instead: its configuration, where neither a file beside it nor its shapes tell it.
    Raises: WeightsError or ConfigError, one line, for what is no part of a Wan, or damaged.
    """
    if path.is_dir():
        found = [(index, *shards_of(index)) for index in indices(path)] or [(file,) for file in _files(path)]
        if len(found) != 1:
            raise WeightsError(f"{path} must hold one file of weights, or shards and their index")
        weights = _weights(found[0], instead)
    elif not path.exists():
        raise WeightsError(f"there is no file at {path}")
    else:
        refuse_pickle(path)
        if path.suffix not in (".safetensors", ".gguf"):
            raise WeightsError(f"{path} is neither safetensors nor GGUF")
        weights = _weights((path,), instead)
    if weights is None:
        raise _unknown(path)
    return weights


def _unknown(path: Path) -> WeightsError:
    """What to raise for weights that are none of a Wan's parts: it says what they are, or how they look."""
    files = _files(path) if path.is_dir() else [path]
    names = sorted(name for file in files for name in _tensors((file,))[0])
    if any(read_key(name)[1] not in ("", "alpha") for name in names):
        return WeightsError(f"{path} is a LoRA, no part of a base: give it with --lora")
    keys = f"its keys are {some(names, 3)}" if names else "it has no keys"
    return WeightsError(f"{path} is no transformer, VAE, UMT5 or CLIP of a Wan that is known: {keys}")


def open_base(place: Path, elsewhere: Mapping[str, Path]) -> Base:
    """The base at `place`, a folder in any layout or a transformer's file.

    Args: elsewhere: files, or folders with shards, of base.PARTS that replace those at `place`.
    Raises: WeightsError or ConfigError, one line.
    """
    folder = open_folder(place, elsewhere) if is_folder(place) else None
    given = {}
    for name, path in elsewhere.items():
        own = None if folder is None or name not in folder.parts else folder.parts[name].config
        given[name] = weights = open_weights_at(path, own)
        if weights.kind != name.removesuffix("_2"):
            raise WeightsError(f"{path} is a {weights.kind}, no {name}: give it with {OPTIONS[weights.kind]}")
    if folder is None:
        return open_files(place, given)
    parts = {name: part for name, part in folder.parts.items() if name not in elsewhere}
    parts |= {name: weights.part for name, weights in given.items()}
    texts = [weights.tokenizer for weights in given.values() if weights.tokenizer is not None]
    held = {path: was for weights in given.values() for path, was in weights.held.items()}
    return replace(
        folder,
        parts=parts,
        files=named_files(place, given, folder.files),
        held={**folder.held, **held},
        tokenizer=texts[0] if texts else folder.tokenizer,
    )


def open_files(place: Path, given: Mapping[str, Weights]) -> Base:
    """The base whose parts lie in files at `place`, a folder or a transformer's file.

    Args: given: parts that lie elsewhere, which need not be at `place`.
    Raises: WeightsError or ConfigError, one line, that says what is missing, or more than once there.
    """
    if place.is_dir():
        found = _found(place)
        original = any(weights.told.get("_class_name") in WANS for weights in found) or _pickles(place)
        layout = ORIGINAL if original else COMFYUI
    else:
        there = any(weights.where == place for weights in given.values())
        layout, found = COMFYUI, [] if there else [open_weights_at(place)]
    found = [weights for weights in found if weights.kind not in given]
    kinds = {weights.kind for weights in found} | set(given)
    _require(place, kinds, "transformer", "vae", "text_encoder")
    parts = {**_chosen(place, found, given.get("transformer")), **given}
    if parts["transformer"].part.config.get("image_dim") is not None:
        _require(place, set(parts), "image_encoder")
    return base_of(place, layout, parts)


def base_of(place: Path, layout: str, parts: Mapping[str, Weights]) -> Base:
    """The base of these parts; place: the folder that the names of their files are told below."""
    transformer = parts["transformer"].part
    index: dict[str, Any] = {}
    own = transformer.config
    if own.get("out_channels") == TI2V_CHANNELS or own.get("_model_type") == "ti2v":
        index["expand_timesteps"] = True
    found = {name: weights.part for name, weights in parts.items()}
    base = Base(place, layout, found, index)
    if "transformer_2" in parts:
        base = replace(base, index=index | {"boundary_ratio": release_of(base).boundary})
    files = named_files(place, parts)
    held = {path: was for weights in parts.values() for path, was in weights.held.items()}
    texts = [weights.tokenizer for weights in parts.values() if weights.tokenizer is not None]
    tokenizer: str | Path | None = texts[0] if texts else None
    if tokenizer is None and (path := find_tokenizer(place, parts["text_encoder"].where)) is not None:
        tokenizer = path
        files[path.relative_to(place).as_posix() if path.is_relative_to(place) else path.name] = path
        held |= identities([path])
    return replace(base, files=files, held=held, tokenizer=tokenizer)


def named_files(
    place: Path, parts: Mapping[str, Weights], taken: Mapping[str, Path] | None = None
) -> dict[str, Path]:
    """The files of these parts, by the names under which they are recorded: their paths below `place`, or
    where they lie elsewhere their names."""
    found = dict(taken or {})
    for kind, weights in parts.items():
        for file in weights.files:
            inside = place.is_dir() and file.is_relative_to(place)
            name = file.relative_to(place).as_posix() if inside else file.name
            if found.get(name, file) != file:
                name = f"{kind}/{file.name}"
            found[name] = file
    return found


def find_tokenizer(*places: Path) -> Path | None:
    """The tokenizer that lies in one of these folders, or beside one of these files: tokenizer.json, or else
    a SentencePiece model."""
    folders = [place if place.is_dir() else place.parent for place in places]
    names = [f"{below}/{file}" for file in ("tokenizer.json", "spiece.model") for below in TOKENIZERS]
    paths = (folder / name.lstrip("/") for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


def read_spiece(path: Path) -> str:
    """The text of a tokenizer.json that a SentencePiece model's file is. Raises ValueError, OSError."""
    return from_spiece(read_plain(path, LARGEST))


def _found(place: Path) -> list[Weights]:
    """Every part that lies in a folder of these layouts."""
    found = []
    for folder in _folders(place):
        sharded = [(index, *shards_of(index)) for index in indices(folder)]
        inside = {file for files in sharded for file in files}
        units = sharded + [(file,) for file in _files(folder) if file not in inside]
        found += [weights for unit in units if (weights := _weights(unit)) is not None]
    return found


def _folders(place: Path) -> list[Path]:
    """Where the files of these layouts may lie."""
    folders = (place / root / below for root in ROOTS for below in ("", *BELOW))
    return [folder for folder in folders if folder.is_dir()]


def _files(folder: Path) -> list[Path]:
    return listed(folder, "*.safetensors") + listed(folder, "*.gguf")


def shards_of(index: Path) -> list[Path]:
    """The files that an index names. Raises WeightsError."""
    return [index.parent / file for file in read_index(index)]


def _tensors(files: tuple[Path, ...]) -> tuple[Mapping[str, Stored], Mapping[str, Any]]:
    """The tensors of a file, or of an index and its shards, and the metadata of GGUF."""
    if files[0].suffix == ".gguf":
        return read_gguf(files[0])
    return read_header(files[0]) if len(files) == 1 else tensors_of(files[0]), {}


def _weights(files: tuple[Path, ...], instead: Mapping[str, Any] | None = None) -> Weights | None:
    """The part that a file is, or an index and its shards; None for what is none of a Wan."""
    where = files[0]
    beside = [
        where.with_name(f"{where.name.partition('.safetensors')[0].removesuffix('.gguf')}.json"),
        where.with_name(CONFIG),
    ]
    held = identities((*files, *beside))
    raw, metadata = _tensors(files)
    tokenizer = _text(where, lambda: from_gguf(metadata))
    tensors = without_prefix(raw)
    spelling = spelling_of(tensors)
    if spelling is None:
        return None
    if spelling.part == "transformer" and any(name.startswith(WHOLE) for name in tensors):
        raise WeightsError(f"{where} is all parts in one file, which is not read: give each part's own file")
    if (spiece := tensors.pop(SPIECE, None)) is not None:
        tokenizer = _text(where, lambda: from_spiece(_bytes(spiece)))
    renamed = as_diffusers(spelling.part, tensors, where)
    told: Mapping[str, Any] = {}
    for path in beside:
        if not told and path.is_file() and _kind_of_config(values := read_json(path)) == spelling.part:
            told, files = values, (*files, path)
    return Weights(spelling.part, where, renamed, told, instead, files, held, tokenizer)


def _kind_of_config(values: Mapping[str, Any]) -> str | None:
    """Which part a config.json is of."""
    kinds = {
        **dict.fromkeys(("WanModel", "WanTransformer3DModel", VACE_CLASS, *V3_TRANSFORMERS), "transformer"),
        "AutoencoderKLWan": "vae",
        "umt5": "text_encoder",
        "clip_vision_model": "image_encoder",
    }
    found = [values.get("_class_name"), values.get("model_type")]
    if all(name in values for name in ("dim", "num_heads", "in_dim")):
        return "transformer"  # Wan's own, whatever its class is called
    return next((kinds[name] for name in found if isinstance(name, str) and name in kinds), None)


def _chosen(place: Path, found: list[Weights], given: Weights | None) -> dict[str, Weights]:
    """One of each part; given: the transformer, where it lies elsewhere. Raises WeightsError where there are
    more and nothing tells which."""
    chosen: dict[str, Weights] = {}
    transformers = [weights for weights in found if weights.kind == "transformer"]
    if len(transformers) == 2 and {weights.expert for weights in transformers} == {"high", "low"}:
        transformers.sort(key=lambda weights: str(weights.expert))  # high, low
        chosen = {
            "transformer": transformers[0],
            "transformer_2": replace(transformers[1], kind="transformer_2"),
        }
    elif len(transformers) == 1:
        chosen["transformer"] = transformers[0]
    elif transformers:
        names = some(weights.where.name for weights in transformers)
        raise WeightsError(
            f"{place} has {len(transformers)} transformers ({names}): say which with --transformer FILE, and "
            "--transformer-2 FILE for a low-noise expert"
        )
    transformer = chosen.get("transformer", given)
    config = {} if transformer is None else transformer.part.config
    for kind in ("vae", "text_encoder", "image_encoder"):
        several = [weights for weights in found if weights.kind == kind]
        if kind == "image_encoder" and transformer is not None and config.get("image_dim") is None:
            continue  # it lies there for another model
        if kind == "vae" and len(several) > 1 and transformer is not None:
            fits = [w for w in several if w.part.config.get("z_dim") == config.get("out_channels")]
            several = fits or several
        if len(several) > 1:
            names = some(weights.where.name for weights in several)
            raise WeightsError(
                f"{place} has several of the {kind} ({names}): say which with {OPTIONS[kind]} FILE"
            )
        if several:
            chosen[kind] = several[0]
    return chosen


def _require(place: Path, there: Set[str], *needed: str) -> None:
    """Raises WeightsError, which tells what to do, where a part is missing."""
    missing = [kind for kind in needed if kind not in there]
    if not missing:
        return
    pickles = list(_pickles(place)) if place.is_dir() else []
    if pickles and there:
        paths = [path.relative_to(place) for path in pickles[:MOST_TOLD]]
        pairs = [(path, path.with_suffix(".safetensors")) for path in paths]
        commands = [f"conceptmaster convert {shell_word(old)} {shell_word(new)}" for old, new in pairs]
        raise WeightsError(
            f"{place} has no {', '.join(missing)}, but pickles, which can run code when loaded: convert "
            f"them, which runs nothing: cd {shell_word(place)} && {' && '.join(commands)}"
        )
    if pickles:
        refuse_pickle(pickles[0])
    if not there:
        raise WeightsError(
            f"{place} has no weights in a layout that is read: diffusers' (transformer/, vae/, "
            "text_encoder/), Wan's original one, ComfyUI's files, or this project's model.safetensors"
        )
    if place.name in EXPERTS.values():
        raise WeightsError(
            f"{place} is one of Wan2.2 A14B's two experts, which alone makes no video: give the folder that "
            "has both"
        )
    options = ", ".join(f"{OPTIONS[kind]} FILE" for kind in missing)
    raise WeightsError(f"{place} has no {', '.join(missing)}: say where with {options}")


def _pickles(place: Path) -> list[Path]:
    """The pickles at a place that no safetensors of the same stem stands for."""
    found = [
        path for folder in _folders(place) for path in listed(folder, "*") if path.suffix.lower() in PICKLES
    ]
    return [path for path in found if not path.with_suffix(".safetensors").exists()]


def _text(where: Path, make: Any) -> str | None:
    """A tokenizer's text. Raises WeightsError for what is none."""
    try:
        text: str | None = make()
    except (ValueError, TypeError, OverflowError) as error:
        raise WeightsError(
            f"{where}: its tokenizer is not read: {' '.join(str(error).split()):.200}"
        ) from error
    return text


def _bytes(tensor: Stored) -> bytes:
    if tensor.kind != "U8" or tensor.shape.numel() > LARGEST:
        raise ValueError("it is no SentencePiece model")
    return tensor.load().numpy().tobytes()
