"""A bundle's graph as TensorRT wants it, its precision said by its own dtypes.

TensorRT's networks are strongly typed: what a product is computed in is the dtype of what goes into it. So a
graph in bf16 or fp16 is the float32 graph with casts around its products (MatMul, Gemm, Conv, attention) and
their weights stored in 16 bits; norms, softmax, modulation, residuals, guidance and the solver stay float32,
and so do inputs and outputs, which every backend shares. TensorRT fuses the casts with their neighbours.
fp8 is bf16 with the matrices of the transformer's blocks in 8 bits: see fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from onnxscript import ir
from onnxscript.ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from ...errors import ExportError, InputError
from ...runtime.bundle_format.tensorrt_engines import PRECISIONS
from ..onnx_graphs import initializers
from ..onnx_graphs.concept_node import DOMAIN, fix_sizes
from ..onnx_graphs.initializers import constant
from ..onnx_graphs.trace import save
from .builder import FUSED_WIDTHS
from .fp8 import quantise_linears
from .rewrites import lower_ranks, separate_queries

NARROW = {
    "fp16": (ir.DataType.FLOAT16, np.dtype(np.float16)),
    "bf16": (ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
"""Operators, besides this project's own nodes, that compute in 16 bits where the precision says so."""


TEXT_BIAS = 6
"""Which input of this project's own nodes that is: the others have fewer."""


def prepare(source: Path, target: Path, precision: str, largest: Mapping[str, float] | None = None) -> None:
    """Writes the graph `source` to `target` in `precision`, one of PRECISIONS, for TensorRT's parser.

    Weights beside the graph are read one after the other, and written beside `target`. largest: for fp8, see
    `quantise_linears`; without it, as for every graph but denoise, fp8 is bf16.
    Raises InputError for an unknown precision, a graph in int8, and fp16 that a weight does not fit into.
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    model = ir.load(source)
    _refuse_int8(model, source)
    fix_sizes(model)
    lower_ranks(model)
    separate_queries(model)
    reduce(model, precision, largest or {}, emulate=False)
    save(model, target)


def reduce(model: ir.Model, precision: str, largest: Mapping[str, float], *, emulate: bool) -> None:
    """Does to `model` what `precision` says; emulate: see `narrow`."""
    if precision != "fp32":
        narrow(model, "bf16" if precision == "fp8" else precision, emulate=emulate)
    if precision == "fp8" and largest:
        quantise_linears(model, largest)


def narrow(model: ir.Model, precision: str, *, emulate: bool) -> None:
    """Casts what goes into every product, and stores its weights, in `precision`; casts what comes out back.

    emulate: rounds the same values but computes in float32, for an ONNX Runtime that lacks the kernels; the
        accumulation of a tensor core is float32 too.
    Raises ExportError where shape inference leaves open what a product reads: it would stay float32 unseen.
    """
    kind, dtype = NARROW[precision]
    ShapeInferencePass()(model)
    cast = _Casts(model.graph, kind, dtype, emulate)
    for node in list(model.graph):
        own = node.domain == DOMAIN
        if (own or (not node.domain and node.op_type in PRODUCTS)) and _fused(node, own):
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype is None:
                    raise _unknown(node)
                if own and index == TEXT_BIAS:  # float32 for the plugin; the body casts it
                    continue
                if value is not None and value.dtype == ir.DataType.FLOAT:
                    node.replace_input_with(index, cast.narrowed(value))
            cast.widen(node)
    RemoveUnusedNodesPass()(model)
    forget_types(model)


def forget_types(model: ir.Model) -> None:
    """Takes away what is told of the values between a graph's inputs and outputs, which may be wrong now."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None


def _fused(node: ir.Node, own: bool) -> bool:
    """Whether a product is computed in 16 bits; of attention, by its head width."""
    if not own and node.op_type != "Attention":
        return True
    q = node.inputs[0]
    if q is None or q.shape is None:
        raise _unknown(node)
    heads = node.attributes.get("heads" if own else "q_num_heads")
    width = int(q.shape[-1])  # type: ignore[arg-type]
    return (width if heads is None or len(q.shape) == 4 else width // heads.as_int()) in FUSED_WIDTHS


def _unknown(node: ir.Node) -> ExportError:
    return ExportError(f"what goes into the node {node.name!r} ({node.op_type}) is of unknown shape or type")


class _Casts:
    """Makes casts, each once, and knows which float32 values are 16 bits cast back."""

    def __init__(self, graph: ir.Graph, kind: ir.DataType, dtype: np.dtype, emulate: bool) -> None:
        self._graph, self._kind, self._dtype, self._emulate = graph, kind, dtype, emulate
        self._narrow: dict[ir.Value, ir.Value] = {}  # float32 value -> the same in 16 bits

    def narrowed(self, value: ir.Value) -> ir.Value:
        """`value` in 16 bits."""
        if value not in self._narrow:
            tensor = constant(value)
            if tensor is not None:
                self._narrow[value] = self._stored(value, tensor)
            else:
                back = [ir.DataType.FLOAT] if self._emulate else []
                self._narrow[value] = self._cast(value, self._kind, *back)
        return self._narrow[value]

    def widen(self, node: ir.Node) -> None:
        """Lets `node` give 16 bits, and everybody who reads it, the same in float32."""
        for out in node.outputs:
            if not out.name or out.dtype != ir.DataType.FLOAT:
                continue
            uses = list(out.uses())
            rounding = [self._kind] if self._emulate else []
            wide = self._cast(out, *rounding, ir.DataType.FLOAT)
            for user, index in uses:
                user.replace_input_with(index, wide)
            self._take_output(out, wide)
            self._narrow[wide] = wide if self._emulate else out  # rounded already
            if not self._emulate:
                out.type = ir.TensorType(self._kind)

    def _take_output(self, out: ir.Value, wide: ir.Value) -> None:
        for index, value in enumerate(self._graph.outputs):
            if value is out:
                wide.shape, wide.type = out.shape, ir.TensorType(ir.DataType.FLOAT)
                name = out.name
                out.name = f"{name}.{self._kind.name.lower()}"
                wide.name = name
                self._graph.outputs[index] = wide

    def _cast(self, value: ir.Value, *kinds: ir.DataType) -> ir.Value:
        """`value` cast to the first of `kinds`, that to the next, and so on, right behind what makes it."""
        for kind in kinds:
            place = value.producer()
            node = ir.node("Cast", [value], attributes={"to": int(kind)})
            node.name = f"{value.name}.to_{kind.name.lower()}"
            node.outputs[0].name = f"{value.name}.as_{kind.name.lower()}"
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(kind), value.shape
            if place is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(place, node)
            value = node.outputs[0]
        return value

    def _stored(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        """A weight in 16 bits, computed when the graph is written."""
        cast = value.producer()
        if cast is not None and cast.inputs[0] is not None and tensor.dtype == self._kind:
            if not self._emulate:  # stored so already
                return cast.inputs[0]
        dtype, wide = self._dtype, np.dtype(np.float32)
        if self._kind == ir.DataType.FLOAT16 and tensor.dtype != self._kind:
            most = float(np.abs(tensor.numpy().astype(wide)).max(initial=0.0))
            if not most <= float(np.finfo(np.float16).max):
                raise InputError(
                    f"the weight {value.name!r} has values up to {most:.1e}, too large for float16: "
                    "choose bf16"
                )
        name = f"{value.name}.{self._kind.name.lower()}"
        if self._emulate:
            stored = initializers.later(name, tensor, wide, lambda x: x.astype(dtype).astype(wide))
        else:
            stored = initializers.later(name, tensor, dtype, lambda x: x.astype(dtype))
        return initializers.add(self._graph, name, stored)


def _refuse_int8(model: ir.Model, source: Path) -> None:
    for node in model.graph:
        if node.op_type in ("MatMulInteger", "DynamicQuantizeLinear"):
            raise InputError(
                f"{str(source)!r} is in int8 for CPUs: TensorRT takes neither its node {node.name!r} nor any "
                f"other {node.op_type}; build from the fp32 bundle of the same model"
            )
