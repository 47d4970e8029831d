"""The weights of a bundle as PyTorch modules: found where its manifest says, opened, and held to its record.

A bundle holds ONNX graphs, whose weights have been transposed, folded and renamed; the torch backend runs the
safetensors that they were exported from. Which these are stands in the manifest, with their SHA-256: whatever
is found or given must have those. A bundle of format 1 or 2 records nothing: what is given is used once its
configuration is the manifest's.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path

from ....engine.checkpoints.safetensors_io import on_meta
from ....engine.checkpoints.source import PRESET, Choices, LoraFile, Source, is_base, open_source
from ....engine.config import ModelConfig
from ....engine.model import ConceptMaster
from ....engine.vae.wan_decoder import build_vae
from ....errors import ConfigError, InputError
from ....hashed import sha256_file
from ...bundle_format.find import SHIPPED, Bundle
from ...bundle_format.hashed_file import HashedFile
from ...bundle_format.source_record import WEIGHTS, MergedLora, SourceRecord

log = logging.getLogger(__name__)

INSIDE = "weights"
"""The folder in a bundle where its weights may lie."""
OPTIONS = {"adapter": "--adapter", "delta": "--custom"}
"""What gives a file that a bundle was made with."""


def open_weights(
    bundle: Bundle, place: str | Path | None, given: Choices, option: str = "--weights"
) -> Source:
    """What `bundle` was exported from, see the module's text.

    Args: place: as for `open_source`; None is where the manifest's record leads to, unless `given` says where
        the transformer is. given: adapter, LoRAs, revision and single parts for a base;
        scales that are recorded may be left out. option: what says the place, for
        messages.
    Raises: InputError, one line, that names the piece which is missing or is another one.
    """
    record = bundle.manifest.source
    whole = "transformer" in given.parts and (record is None or record.commit is None)
    if place is None and not whole:
        place = _place(bundle, option)
    if place is None or is_base(place):
        shapes = bundle.manifest.shapes
        conditioning, size = bundle.manifest.conditioning, (shapes.width, shapes.height)
        own = conditioning is not None and (conditioning.beside or conditioning.by_branch)
        references = shapes.concepts if own else None
        side = None if conditioning is None else conditioning.side or None
        given = dataclasses.replace(given, size=size, frames=shapes.frames, references=references)
        given = dataclasses.replace(given, reference_side=side)
    if record is not None and (place is None or is_base(place) or given.merged == given):
        given = _recorded(record, place, given, bundle)
    source = open_source(place, given, bundle.tokenizer)
    place = place or given.parts["transformer"]
    _check_model(bundle, source, place)
    if record is None or not any(record.weights()):
        log.info("the bundle records no SHA-256 of its weights: those of %s are taken as they are", place)
        return source
    if (difference := _difference(source, record)) is not None:
        raise InputError(
            f"the weights in {str(place)!r} are not those that the bundle {str(bundle.folder)!r} was "
            f"exported from: {difference}"
        )
    return source


def count_weights(config: ModelConfig) -> dict[str, int]:
    """Elements by part, of a model that is not loaded yet. Raises ConfigError where it cannot be built."""
    model, vae = on_meta(ConceptMaster, config, config.name), on_meta(build_vae, config, config.name)
    found = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return found | {"vae": sum(p.numel() for p in vae.parameters())}


def _place(bundle: Bundle, option: str) -> str | Path:
    """Where a bundle's weights are, as far as it tells."""
    inside, record = bundle.folder / INSIDE, bundle.manifest.source
    if inside.is_dir():
        return inside
    if record is not None and (record.commit is not None or record.name.startswith(PRESET)):
        return record.name
    if record is not None:  # the weights of the bundles that come with the package
        example = SHIPPED.parents[1] / "examples" / bundle.manifest.name / record.name
        if example.is_dir():
            return example
    known = "" if record is None else f" (it was made from {record.name!r})"
    raise InputError(
        f"found no weights of the bundle {str(bundle.folder)!r}{known}: say where they are with {option}, or "
        f"put its model.safetensors and vae.safetensors into the bundle's {INSIDE}/"
    )


def _recorded(record: SourceRecord, place: str | Path | None, given: Choices, bundle: Bundle) -> Choices:
    """`given` with what the record says; every file is the recorded one. Raises InputError."""
    here = [] if place is None else [Path(place)]
    folders = [folder for folder in (*here, bundle.folder / INSIDE) if folder.is_dir()]
    wanted = [] if record.adapter is None else [record.adapter]
    adapters = [] if given.adapter is None else [given.adapter]
    adapter = _find("adapter", wanted, adapters, folders)
    paths = _find("LoRA", record.loras, [lora.path for lora in given.loras], folders)
    scales = {(lora.path, lora.expert): lora.scale for lora in given.loras}
    loras = []
    for path, lora in zip(paths, record.loras, strict=True):
        if (scale := scales.get((path, lora.expert))) not in (None, lora.scale):
            raise InputError(f"the bundle has {lora.file!r} at scale {lora.scale:g}, not {scale:g}")
        loras.append(LoraFile(path, lora.scale, lora.partial, lora.expert))
    revision = given.revision or (record.commit if str(place) == record.name else None)
    custom = tuple(_find("delta", record.custom, list(given.custom), folders))
    given = dataclasses.replace(given, loras=tuple(loras), custom=custom)
    return dataclasses.replace(given, adapter=adapter[0] if adapter else None, revision=revision)


def _find(
    kind: str, wanted: Iterable[HashedFile | MergedLora], given: list[Path], folders: list[Path]
) -> list[Path]:
    """The file of each of `wanted`, out of those that are given or lie in `folders`, by its SHA-256."""
    left = list(given)
    found: list[Path] = []
    for piece in wanted:
        beside = [path for folder in folders if (path := folder / piece.file).is_file()]
        files = [path for path in (*left, *found, *beside) if path.is_file()]
        right = next((path for path in files if sha256_file(path) == piece.sha256), None)
        if right is None:
            others = f"; {', '.join(map(str, left))} is another one" if left else ""
            option = piece.option if isinstance(piece, MergedLora) else OPTIONS[kind]
            raise InputError(
                f"the bundle was made with the {kind} {piece.file!r} (SHA-256 {piece.sha256:.12}…): give it "
                f"with {option} FILE{others}"
            )
        left = [path for path in left if path != right]
        found.append(right)
    if left:
        raise InputError(f"the bundle was made without the {kind} {str(left[0])!r}")
    return found


def _check_model(bundle: Bundle, source: Source, place: str | Path) -> None:
    """Raises InputError unless the source has the manifest's configuration, whatever its folder is called.
    It gets the bundle's mask, of which no weight depends."""
    try:
        config = ModelConfig.from_dict(bundle.manifest.model)
        source.model.mask_by(config.concept.mask)
        same = dataclasses.replace(source.model.config, name=config.name) == config
    except ConfigError:
        same = False
    if not same:
        raise InputError(f"the weights in {str(place)!r} are of another model than the bundle")


def _difference(source: Source, record: SourceRecord) -> str | None:
    """What was read with tensors and is not the recorded one, in words; None where all is."""
    wanted = {file.file: file.sha256 for file in record.weights()}
    found = {file: digest for file, digest in source.origin.files.items() if file.endswith(WEIGHTS)}
    same = sorted(wanted.values()) == sorted(found.values())  # wherever they lie
    for name in () if same else sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            return f"{name} is missing" if name in wanted else f"{name} was not part of it"
        if found[name] != wanted[name]:
            return f"{name} has SHA-256 {found[name]:.12}…, recorded is {wanted[name]:.12}…"
    origin = source.origin
    merged = [*(() if origin.adapter is None else (origin.adapter,)), *origin.loras, *origin.custom]
    recorded = [*(() if record.adapter is None else (record.adapter,)), *record.loras, *record.custom]
    if [entry[1] for entry in merged] != [entry.sha256 for entry in recorded]:
        return "the adapter, a LoRA or a delta was changed while it was read"
    return None
