"""Writes a bundle: every graph exported and held to PyTorch, then all of it moved into place at once."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from .. import __version__
from ..engine.checkpoints.source import Origin, Source
from ..engine.concept_config import ConceptConfig
from ..engine.config import ModelConfig
from ..engine.references import AS_TOKENS
from ..engine.sampling import Sampling
from ..errors import ExportError, InputError
from ..hashed import sha256_file
from ..runtime.atomic_folder import replacing_folder
from ..runtime.bundle_format import manifest as manifests
from ..runtime.bundle_format.hashed_file import HashedFile
from ..runtime.bundle_format.place import bundle_files, check_place
from ..runtime.bundle_format.schema import (
    EXPERTS,
    FORMAT,
    Defaults,
    Expert,
    GraphFile,
    Manifest,
    Ranges,
    Shapes,
    Vocabulary,
)
from ..runtime.bundle_format.source_record import MergedLora, SourceRecord
from ..runtime.bundle_format.strict_json import decode
from ..runtime.progress import each
from ..runtime.tokenizer import Tokenizer
from .graphs import GraphSpec, graph_specs
from .onnx_graphs.int8 import precision_of, quantise
from .onnx_graphs.trace import describe, export_graph
from .onnx_graphs.weights_16bit import narrow_in_place
from .recipes import boxes_of, conditioning_of, pictures_of, text_of, tile_of, wording_of
from .verify import Row, check, check_small, checked_specs

TOLD = {"vocabulary": Vocabulary, "ranges": Ranges}
WRITERS = ("torch", "onnx", "onnxscript", "onnxruntime")


def write_bundle(
    source: Source,
    output: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    branches: int = 2,
    tile: tuple[int, int] | None = None,
    text_tokens: int | None = None,
    with_graphs: bool = True,
    overwrite: bool = False,
    progress: bool = False,
) -> list[Row]:
    """Writes the folder `output`, whole or not at all, and returns how far each graph is from PyTorch.

    Args: precision: "fp32" or "int8"; branches: guidance branches K, 1 to 3; tile: width and height, in
        pixels, of the parts that the decoder takes one after the other, None for the whole picture at once;
        text_tokens: how many tokens of text the graphs take, where prompts are shorter than the model's text:
        one of them stands for all padding, and the same frames come out; None for all;
        with_graphs: False writes their signatures alone, for the torch backend; overwrite: replace a bundle
        that is there already, if it holds nothing else.
    Raises: InputError when `output` is taken, for a tile or a number of tokens that cannot be, and for a
        default negative prompt that needs more; ExportError when a graph is too
        far off; OSError.
    """
    folder = Path(os.path.abspath(output))
    check_place(folder, overwrite)
    defaults, told = _defaults(source.sampling, branches), _told(source)
    concept = source.model.config.concept
    if not with_graphs and precision != "fp32":
        raise InputError("int8 is a precision of graphs: a bundle without graphs has none")
    if branches == 3 and concept.given not in ("none", *AS_TOKENS):
        raise InputError("an image-to-video model's guidance is of captions alone: --branches 1 or 2")
    config, whole = text_of(source.model.config, text_tokens)
    tiles = tile_of(config, tile)
    size = None if tiles is None else tiles.size
    how: dict[str, Any] = {"branches": branches, "tile": size}
    specs = graph_specs(source.model, source.vae, config=config, whole_text=whole, **how)
    if precision != "fp32" and specs[0].external:
        raise InputError("int8 is for models whose weights fit the memory: this base's stay on disk")
    graphs: dict[str, GraphFile] = {}
    if not with_graphs:
        graphs, specs = {spec.name: _signature(spec, concept.takes_pictures) for spec in specs}, []
    outside = specs and specs[0].external
    small = checked_specs(source, text_tokens=text_tokens, **how) if outside else specs
    experts = _experts(config, source.sampling, branches)
    with replacing_folder(folder, bundle_files, replace=overwrite) as temporary:
        rows: list[Row] = []
        tokenizer = temporary / "tokenizer.json"
        tokenizer.write_text(source.tokenizer, encoding="utf-8")
        if whole is not None and defaults.negative:
            why = f", or --text-tokens larger than {config.text_tokens}"
            reader = Tokenizer(tokenizer, config.text_encoder["vocab_size"])
            reader.encode(defaults.negative, config.text_tokens - 1, "the default negative prompt", why)
        for spec, checked in zip(each(specs, "export", progress), small, strict=True):
            path = temporary / f"{spec.name}.onnx"
            graphs[spec.name] = export_graph(spec, path, progress)
            if spec.external:
                rows.append(_held(check_small(checked, path)))
                continue
            own = precision_of(spec.name, precision)
            if own != "fp32":
                _held(check(spec, path, "fp32"))
                quantise(path)
            if narrow_in_place(path) or own != "fp32":
                graphs[spec.name] = describe(path, spec)
            rows.append(_held(check(spec, path, own)))
        record = _record(source.origin)
        manifest = Manifest(
            format=FORMAT,
            name=source.model.config.name,
            written_by={"conceptmaster": __version__}
            | {name: importlib.metadata.version(name) for name in WRITERS},
            model=source.model.config.to_dict(),
            shapes=_shapes(config, branches, graphs),
            fps=source.model.config.fps,
            precision=precision,
            pictures=pictures_of(source.model.config),
            defaults=defaults,
            tokenizer=HashedFile(tokenizer.name, sha256_file(tokenizer)),
            graphs=graphs,
            conditioning=conditioning_of(source.model.config),
            tile=tiles,
            boxes=boxes_of(config),
            source=record,
            experts=experts,
            whole_text=whole,
            guided_first="concepts" if concept.given in AS_TOKENS and branches == 3 else "caption",
            **wording_of(source.model.config),
            **told,
        )
        if not manifest.needs_format_7:
            older = 6 if manifest.needs_format_6 else _format(concept, whole, experts, record)
            manifest = dataclasses.replace(manifest, format=older)
        manifests.save(manifest, temporary)
    return rows


def _signature(spec: GraphSpec, concepts: bool) -> GraphFile:
    """A graph that is not exported: what the pipeline gives it, and what it gives; concepts: whether the
    model takes any."""
    unread = () if concepts else ("concept_tokens",)  # which tracing drops, too
    inputs = tuple(tensor for tensor in spec.inputs if tensor.name not in unread)
    return GraphFile("", "", inputs, spec.outputs)


def _format(
    concept: ConceptConfig, whole: int | None, experts: tuple[Expert, ...] | None, record: SourceRecord
) -> int:
    """The oldest format, up to 5, that has what a bundle says."""
    frames_alone = concept.given != "none" and not concept.takes_pictures
    return 5 if experts or frames_alone or record.needs_format_5 else 3 if whole is None else 4


def _experts(config: ModelConfig, sampling: Sampling, branches: int) -> tuple[Expert, ...] | None:
    """What the manifest says of two transformers; None of one. Raises InputError for a scale of a second one
    that is not there."""
    if config.boundary is None:
        if sampling.guidance_2 is not None:
            raise InputError("a guidance of a second expert (guidance_2): the source has one transformer")
        return None
    # without a second branch nothing is guided
    second, scale = (None, 1.0) if branches == 1 else (sampling.guidance_2, sampling.scale_2)
    return Expert(EXPERTS[0], config.boundary), Expert(EXPERTS[1], 0.0, second, scale)


def _record(origin: Origin) -> SourceRecord:
    """What a source was read from, for the manifest."""
    return SourceRecord(
        origin.name,
        tuple(HashedFile(file, digest) for file, digest in origin.files.items()),
        origin.commit,
        None if origin.adapter is None else HashedFile(*origin.adapter),
        tuple(MergedLora(*lora) for lora in origin.loras),
        tuple(HashedFile(*delta) for delta in origin.custom),
    )


def _told(source: Source) -> dict[str, Any]:
    """What a source tells of itself, by the manifest's key. Raises InputError if no manifest can hold it."""
    try:
        return {kind: decode(TOLD[kind], value, f"{kind}.json") for kind, value in source.told.items()}
    except ValueError as error:
        raise InputError(f"{source.origin.name!r}: {error}") from error


def _held(row: Row) -> Row:
    if not row.ok:
        raise ExportError(
            f"the graph {row.graph} ({row.precision}) is off by {row.relative:.1e} relative to PyTorch, "
            f"{row.tolerance:.0e} is allowed: no bundle was written"
        )
    return row


def _shapes(config: ModelConfig, branches: int, graphs: dict[str, GraphFile]) -> Shapes:
    state = graphs["denoise"].input("state")
    assert state is not None
    return Shapes(
        concepts=config.concept.max_concepts,
        picture_size=config.concept.picture_size,
        text_tokens=config.text_tokens,
        label_tokens=config.concept.label_tokens,
        text_width=config.transformer.text_dim,
        queries=config.concept.tokens_per_concept,
        concept_width=config.concept.width,
        branches=branches,
        solver_states=state.shape[0],
        latent=config.latent_shape,
        frames=config.frames,
        height=config.height,
        width=config.width,
    )


def _defaults(sampling: Sampling, branches: int) -> Defaults:
    """Defaults that a bundle of so many branches can follow: without a second one nothing is guided."""
    if branches != 3 and sampling.branches == 3:  # asked for fewer than its own program has
        sampling = dataclasses.replace(sampling, concept_guidance=None)
    if branches != 3 and sampling.concept_guidance is not None:
        raise InputError("the source's default concept_guidance needs 3 guidance branches: --branches 3")
    try:
        given = dataclasses.asdict(sampling)
        for own in ("guidance_2", "scale_2", "branches"):  # which are its expert's, and the shapes'
            del given[own]
        defaults = Defaults(**given)
    except (TypeError, ValueError) as error:
        raise InputError(f"no request can have these defaults (options, defaults.json): {error}") from error
    return dataclasses.replace(defaults, guidance=1.0) if branches == 1 else defaults
