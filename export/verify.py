"""Holds a bundle's graphs to the PyTorch modules they came from."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnxscript import ir

from ..engine.checkpoints.lazy_weights import stored_weights
from ..engine.checkpoints.source import Source
from ..engine.concept_config import PATCH
from ..engine.config import ModelConfig
from ..errors import ExportError, OutOfMemory, is_out_of_memory
from ..runtime.backends.onnxruntime_module import onnxruntime, session_options
from ..runtime.bundle_format.find import Bundle
from ..runtime.progress import each
from .graphs import GraphSpec, graph_specs
from .onnx_graphs.int8 import precision_of
from .onnx_graphs.trace import trace
from .onnx_graphs.weights_16bit import STORED, data_file, place, read_layout, weight_readers
from .recipes import text_of

TOLERANCES = {"fp32": 6e-5, "int8": 1e-1}
"""Largest relative error of a graph, see `relative_error`.

fp32: both sides round. Measured against the same modules in float64, on CPUs of two kinds, the worst graph of
`sprites` is `decode`: PyTorch is off by 0.7e-5 on one and 1.5e-5 on the other, ONNX Runtime by 0.7e-5 on both
(2.3e-5 apart, at most); no other graph's two errors add up to more than 1.1e-5. 6e-5 is four times the
largest, since another CPU adds in another order. int8, for `sprites`: 5e-2, in the velocity alone and under
guidance, which leaves 1e-2 in the state after a step, and videos that differ by 51 dB. A graph that computes
something else is off by 0.5 and more."""

SMALL_TEXT = 32  # words' tokens of a small video
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
SEEDS = (0, 1)  # of the samples that a graph is compared on


@dataclass(frozen=True)
class Row:
    """One graph against its module, over all outputs and samples.

    max_error: largest absolute difference; relative: see `relative_error`; seconds: what the graph takes for
    one sample, by the clock, on one thread; small: for a small video, see `check_small`.
    """

    graph: str
    precision: str
    max_error: float
    relative: float
    tolerance: float
    seconds: float
    small: bool = False

    @property
    def ok(self) -> bool:
        """Whether the graph is within its tolerance; not a number is not."""
        return self.relative <= self.tolerance


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over largest value, for the worst slice along the first axis.

    Slices, because the first axis stacks what is used apart: layers, concepts, the solver's states. Where
    `expected` is all zero any difference is infinitely wrong.
    """
    if found.shape != expected.shape:
        return float("inf")
    worst = 0.0
    for a, b in zip(found.astype(np.float64), expected.astype(np.float64), strict=True):
        difference, largest = float(np.abs(a - b).max()), float(np.abs(b).max())
        if difference != 0.0:
            worst = max(worst, difference / largest) if largest else float("inf")
        if np.isnan(difference):
            return float("nan")
    return worst


def check(spec: GraphSpec, path: Path, precision: str) -> Row:
    """Runs the graph at `path` on the CPU and its module on the same samples. Raises ExportError when ONNX
    Runtime cannot load it."""
    return _compare(spec, open_session(str(path), path), precision)


def check_small(small: GraphSpec, path: Path) -> Row:
    """Holds the external graph at `path` to its module without running it: it would take hours on a CPU.

    small: the same graph for a small video. Traced again, it must have the same operators in the same order;
    then it runs with the weights of `path`, out of the same file, and is compared with the module.
    Raises ExportError when ONNX Runtime cannot load the one or the other, or when they differ.
    """
    open_session(str(path), path)  # the graph itself: every node has a kernel, every weight is there
    full = ir.load(path)
    model, _ = trace(small, weight_readers(small.module))
    layout, known = read_layout(full), set(model.graph.initializers)
    if missing := sorted(known & set(weight_readers(small.module)) - set(layout)):
        raise ExportError(f"the graph {small.name} lacks the weights {', '.join(missing)}")
    place(model, {name: tensor for name, tensor in layout.items() if name in known})
    if _computes(model, layout) != _computes(full, layout):
        raise ExportError(f"the graph {small.name} computes something else for a small video")
    session = open_session(ir.to_proto(model).SerializeToString(), path)
    return replace(_compare(small, session, "fp32"), small=True)


def _computes(model: ir.Model, weights: Iterable[str]) -> list[str]:
    """The operators of `model` in their order, without those that only make constants: of a small video's the
    tracer has folded more away."""
    names = {f"{name}{end}" for name in weights for end in ("", STORED)}
    alive = set(model.graph.inputs) | {v for v in model.graph.initializers.values() if v.name in names}
    operators = []
    for node in model.graph:
        if not alive.isdisjoint(node.inputs):
            alive.update(node.outputs)
            operators.append(node.op_type)
    return operators


def open_session(graph: str | bytes, path: Path) -> onnxruntime.InferenceSession:
    """A graph, by its path or its bytes, on one thread of the CPU; one with weights beside `path` as it is,
    without copies of them: these may not fit the memory."""
    options = session_options(1)
    if data_file(path).exists():
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        if isinstance(graph, bytes):
            options.add_session_config_entry(EXTERNAL_FOLDER, str(path.parent.absolute()))
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types are not public
        if is_out_of_memory(error):
            raise OutOfMemory(f"out of memory while {str(path)!r} was loaded") from error
        raise ExportError(f"ONNX Runtime cannot load {str(path)!r}: {error}") from error


def _compare(spec: GraphSpec, session: onnxruntime.InferenceSession, precision: str) -> Row:
    wanted = [tensor.name for tensor in session.get_inputs()]
    largest, relative, seconds = 0.0, 0.0, float("inf")
    for seed in SEEDS:
        sample = spec.sample(seed)
        expected = [value.numpy() for value in spec.run(sample).values()]
        feed = {name: sample[name].numpy() for name in wanted}
        start = time.perf_counter()
        outputs: list[Any] = session.run([tensor.name for tensor in spec.outputs], feed)
        seconds = min(seconds, time.perf_counter() - start)
        for a, b in zip(outputs, expected, strict=True):
            largest = float(np.fmax(largest, np.abs(a.astype(np.float64) - b).max()))
            relative = float(np.maximum(relative, relative_error(a, b)))  # not a number stays
    tolerance = TOLERANCES[precision]
    return Row(spec.name, precision, largest, relative, tolerance, seconds)


def small_video(config: ModelConfig) -> ModelConfig:
    """`config` for a video of 6 by 4 patches, two of them in time or what pictures need, and few words."""
    patch, vae = config.transformer.patch_size, config.vae
    time, space = vae["scale_factor_temporal"], vae["scale_factor_spatial"]
    latent_frames = patch[0] * max(2, -(-config.concept.min_latent_frames // patch[0]))
    if config.concept.side is not None:
        side = min(config.concept.side, 6 * PATCH)
        config = replace(config, concept=replace(config.concept, side=side))
    if not config.concept.has_modules:  # which reads no labels
        config = replace(config, concept=replace(config.concept, label_tokens=1))
    return replace(
        config,
        frames=min(config.frames, 1 + time * (latent_frames - 1)),
        height=min(config.height, 4 * patch[1] * space),
        width=min(config.width, 6 * patch[2] * space),
        text_tokens=min(config.text_tokens, max(config.concept.label_tokens, SMALL_TEXT)),
    )


def verify(bundle: Bundle, source: Source, progress: bool = False) -> list[Row]:
    """Every graph of `bundle`, compared with `source`, which has its configuration; a row each.

    Those with weights beside them are compared at a small video (see `check_small`). Raises ExportError when
    ONNX Runtime cannot load a graph.
    """
    manifest = bundle.manifest
    shapes = manifest.shapes
    tile = None if manifest.tile is None else manifest.tile.size
    text = None if manifest.whole_text is None else shapes.text_tokens
    keys = manifest.graphs["denoise"].input("concept_keys")  # [layers,R,C,A,E]
    seeing = shapes.branches if keys is None else keys.shape[1]
    specs = checked_specs(source, shapes.branches, shapes.solver_states, tile, text, seeing)
    rows = []
    for spec in each(specs, "verify", progress):
        with bundle.reading(spec.name) as path:
            own = precision_of(spec.name, manifest.precision)
            rows.append(check_small(spec, path) if spec.external else check(spec, path, own))
    return rows


def checked_specs(
    source: Source,
    branches: int,
    solver_states: int = 4,
    tile: tuple[int, int] | None = None,
    text_tokens: int | None = None,
    seeing: int = 1,
) -> list[GraphSpec]:
    """The graphs of `source` as they are compared with PyTorch: external ones for a small video.

    tile, seeing: as for `graph_specs`; text_tokens: as for `text_of`.
    """
    config, whole = text_of(source.model.config, text_tokens)
    if stored_weights(source.model):
        config = small_video(config)
        height, width = config.latent_shape[2:]
        tile = tile and (min(tile[0], height), min(tile[1], width))
    return graph_specs(
        source.model,
        source.vae,
        branches=branches,
        solver_states=solver_states,
        config=config,
        tile=tile,
        whole_text=whole,
        seeing=seeing,
    )


def table(rows: list[Row]) -> str:
    """The rows for people, one line each."""
    lines = [f"{'graph':14} {'':5} {'max error':>10} {'relative':>10} {'tolerance':>10} {'ms':>9}"]
    lines += [
        f"{row.graph:14} {row.precision:5} {row.max_error:10.2e} {row.relative:10.2e} {row.tolerance:10.0e} "
        f"{row.seconds * 1e3:9.2f}  {'ok' if row.ok else 'TOO FAR OFF'}"
        f"{' (small video)' if row.small else ''}"
        for row in rows
    ]
    return "\n".join(lines)
