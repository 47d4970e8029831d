"""One GraphSpec to one ONNX file: traced by PyTorch, cleaned, checked."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import torch
from onnxscript import ir

from ...engine.checkpoints.lazy_weights import faked
from ...errors import ExportError
from ...hashed import sha256_file
from ...kernels.common import kept_whole
from ...runtime.bundle_format.hashed_file import HashedFile
from ...runtime.bundle_format.schema import GraphFile, TensorSpec
from ...runtime.bundle_format.shapes import DTYPES
from ..graphs import GraphSpec
from .concept_node import add_functions, translations
from .fuse_attention import rewrite
from .weights_16bit import data_file, hide, turn, weight_readers, write_weights

# 23 has Attention, RMSNormalization and RotaryEmbedding as operators. The denoise step of `sprites` on ONNX
# Runtime's CPU, one thread, medians of 120 rounds in turn: PyTorch 27.3 ms, opset 20 18.8 ms, 23 17.2 ms, 23
# after `rewrite` 15.4 ms; one product for queries, keys and values together brings nothing more. Masked keys
# count exactly nothing, on ONNX Runtime 1.24 as on 1.31.
OPSET = 23
EXTERNAL_BYTES = 1_500_000_000  # weights beyond this go beside the file: protobuf ends at 2 GiB


def export_graph(spec: GraphSpec, path: Path, show: bool = False) -> GraphFile:
    """Writes `spec` to `path`, and its weights to `path`.data when it is external or they are many.

    Every shape is fixed; the file names no machine, path or time, so the same weights give the same bytes.
    Weights on disk (engine/checkpoints/lazy_weights.py) go from file to file one by one; show: a progress
    bar for that.
    Returns the graph's entry for the manifest, its signature as it is in the file: an input that the graph
    turned out not to use is not there. Raises ExportError when the graph is not a valid one, WeightsError
    when weights cannot be read.
    """
    if not spec.external:
        save(trace(spec)[0], path)
        return describe(path, spec)
    readers = weight_readers(spec.module)
    model, turned = trace(spec, readers)
    digest = write_weights(model, readers, turned, path, show)
    ir.save(model, path)
    return describe(path, spec, digest)


def trace(spec: GraphSpec, hidden: Iterable[str] = ()) -> tuple[ir.Model, set[str]]:
    """The model of `spec`, and which of the weights `hidden` it reads transposed (see `turn`).

    hidden: weights of which the model gets name and shape but no values; they may be on disk.
    """
    hidden = set(hidden)
    with _quiet(), kept_whole(), torch.no_grad(), faked(spec.module) as mode:
        with mode if hidden else contextlib.nullcontext():
            sample = [torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for t in spec.inputs]
        program = torch.onnx.export(
            spec.module,
            tuple(sample),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            external_data=False,
            custom_translation_table=translations(),
            verbose=False,
            optimize=not hidden,
        )
        assert program is not None
        model = program.model
        if hidden:
            hide(model, hidden)
            program.optimize()
            model = program.model
    add_functions(model)
    turned = turn(model, hidden)
    rewrite(model)
    _clean(model, spec)
    return model, turned


def save(model: ir.Model, path: Path) -> None:
    """Writes a model with all of its weights, which go to `path`.data, one after the other, when some of them
    are beside a graph already or when they are more than EXTERNAL_BYTES."""
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value]
    beside = any(isinstance(weight, ir.ExternalTensor) for weight in weights)
    large = sum(weight.nbytes for weight in weights) > EXTERNAL_BYTES
    ir.save(model, path, external_data=data_file(path).name if beside or large else None)


def describe(path: Path, spec: GraphSpec, external_sha256: str | None = None) -> GraphFile:
    """The manifest's entry for a graph file. Raises ExportError when it is not sound or not `spec`'s.

    external_sha256: of the file beside it, if that is known already.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker and shape inference have several types, one of them private
        raise ExportError(f"the exported graph {spec.name} is not valid: {error}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    inputs, outputs = _signature(graph.input), _signature(graph.output)
    expected = tuple(tensor for tensor in spec.inputs if tensor.name in {found.name for found in inputs})
    if inputs != expected or outputs != spec.outputs:
        raise ExportError(f"the exported graph {spec.name} has another signature than its module")
    external = data_file(path)
    return GraphFile(
        path.name,
        sha256_file(path),
        inputs,
        outputs,
        (HashedFile(external.name, external_sha256 or sha256_file(external)),) if external.exists() else (),
    )


def _clean(model: ir.Model, spec: GraphSpec) -> None:
    """Drops what is not computation: stack traces with this machine's paths, notes, unused inputs."""
    model.producer_name, model.producer_version, model.doc_string = "conceptmaster", None, None
    model.metadata_props.clear()
    graph = model.graph
    graph.name, graph.doc_string = spec.name, None
    graph.metadata_props.clear()
    for index, value in enumerate(graph.outputs):
        if value.is_initializer():  # a state that starts at zero: a constant, which no output may be as such
            graph.outputs[index] = _copied(graph, value)
    outputs, taken = set(graph.outputs), dict[str, int]()
    for node in graph.all_nodes():
        node.name = _place(node, taken)
        node.doc_string = None
        node.metadata_props.clear()
    made = [value for node in graph.all_nodes() for value in node.outputs if value not in outputs]
    inner = [*made, *graph.initializers.values()]
    for value in inner:  # inferred anew by whoever loads the file, and ONNX Runtime's quantiser trips over it
        value.shape = value.type = None
    for value in [*graph.inputs, *graph.outputs, *inner]:
        value.metadata_props.clear()
        value.doc_string = None
    for value in list(graph.inputs):
        if not value.uses() and value not in outputs:
            graph.inputs.remove(value)


def _copied(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A value of the same name that is computed, by copying `value`."""
    node = ir.node("Identity", [value])
    graph.append(node)
    copy = node.outputs[0]
    copy.shape, copy.type = value.shape, value.type
    name, value.name = value.name, f"{value.name}_constant"
    copy.name = name
    return copy


def _place(node: ir.Node, taken: dict[str, int]) -> str:
    """A unique name that says which module a node comes from: "transformer.blocks.0.attn1.to_q.MatMul"."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))  # outermost first
    name = ".".join([*scopes[-2:-1], node.op_type]).lstrip(".")
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}_{taken[name]}"


def _signature(values: list[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        assert dtype in DTYPES
        specs.append(TensorSpec(value.name, dtype, tuple(d.dim_value for d in tensor.shape.dim)))
    return tuple(specs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress on standard output and its remarks on what it did not optimise."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
