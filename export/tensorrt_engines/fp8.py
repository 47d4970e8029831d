"""fp8 for TensorRT: QuantizeLinear and DequantizeLinear around the matrices of the transformer's blocks.

    x -> QuantizeLinear -> DequantizeLinear -\\
                    weight -> DequantizeLinear -> MatMul

is what TensorRT takes for one product on the 8-bit tensor cores (explicit quantization). Numbers are
float8_e4m3fn, and one scale belongs to each tensor. Scales are powers of two: these can be stored in any
dtype, multiplying by one rounds nothing, and since numbers with an exponent are as fine at half of their
range as at all of it, nothing is gained by filling that. Products of activations (attention), the layers
around the blocks, and everything between the products stay what they are.

Both factors keep 4 significant bits, which puts 3 to 4 % of error into each product, whatever the model. All
ten matrices of a block of `sprites` cost 5 to 9 % of a step's estimate of the latents (relative L2, four of
eight steps of a request), where bf16 alone costs 1 %: those of the feed-forward network and of
self-attention's values and output most, 3 to 5 % each. They are most of the time, too, so all are in fp8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from onnxscript import ir
from onnxscript.ir.passes.common import RemoveUnusedNodesPass

from ...errors import ExportError
from ..onnx_graphs import initializers
from ..onnx_graphs.initializers import constant

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
"""The largest value of float8_e4m3fn; what is larger is taken for it."""
HEADROOM = 4.0
"""How much larger than in the calibration an activation may become before it is cut off."""


def linears(model: ir.Model) -> list[ir.Node]:
    """The products of the transformer's blocks with a constant matrix, in their order."""
    return [
        node
        for node in model.graph
        if node.op_type == "MatMul" and ".blocks." in (node.name or "") and _matrix(node) is not None
    ]


def quantise_linears(model: ir.Model, largest: Mapping[str, float]) -> None:
    """Puts the nodes into a graph that is in bf16, or that emulates it (see `precision.narrow`).

    largest: by the name of each of `linears`, the largest magnitude that goes into it (see calibrate.py).
    Raises ExportError for one that is not there.
    """
    rounded: dict[tuple[ir.Value, float], ir.Value] = {}  # one pair of nodes for all that read a value
    for node in linears(model):
        x, weight = node.inputs
        tensor = constant(weight)
        assert x is not None and weight is not None and tensor is not None
        if node.name not in largest:
            raise ExportError(f"fp8 needs the range of what goes into {node.name!r}, which is not known")
        dtype = tensor.dtype  # bfloat16; float32 where it is emulated
        key = x, scale_for(largest[node.name] * HEADROOM)
        if key not in rounded:
            rounded[key] = _rounded(model.graph, *key, dtype, node)
        node.replace_input_with(0, rounded[key])
        node.replace_input_with(1, _stored(model.graph, weight, tensor, node))
    RemoveUnusedNodesPass()(model)


def scale_for(most: float) -> float:
    """The smallest power of two by which values up to `most` can be divided to be at most LARGEST."""
    return 2.0 ** math.ceil(math.log2(most / LARGEST)) if most > 0 else 1.0


def _matrix(node: ir.Node) -> ir.TensorProtocol | None:
    tensor = constant(node.inputs[1])
    return tensor if tensor is not None and len(tensor.shape) == 2 else None


def _rounded(graph: ir.Graph, x: ir.Value, scale: float, dtype: ir.DataType, place: ir.Node) -> ir.Value:
    """x, rounded to 8 bits on the way to `place`."""
    parts = [initializers.add(graph, f"{place.name}.x_scale", np.array(scale, dtype.numpy()))]
    parts.append(initializers.add(graph, f"{place.name}.x_zero", np.array(0, FP8)))
    narrow = _insert(graph, place, "QuantizeLinear", [x, *parts], ir.DataType.FLOAT8E4M3FN)
    return _insert(graph, place, "DequantizeLinear", [narrow, *parts], dtype)


def _stored(graph: ir.Graph, weight: ir.Value, tensor: ir.TensorProtocol, place: ir.Node) -> ir.Value:
    """A weight, stored in 8 bits."""
    scale = scale_for(float(np.abs(tensor.numpy().astype(np.float32)).max(initial=0.0)))
    narrow = initializers.add(
        graph,
        f"{weight.name}.fp8",
        initializers.later(f"{weight.name}.fp8", tensor, FP8, lambda x: (x.astype("f4") / scale).astype(FP8)),
    )
    parts = [initializers.add(graph, f"{weight.name}.scale", np.array(scale, tensor.dtype.numpy()))]
    parts.append(initializers.add(graph, f"{weight.name}.zero", np.array(0, FP8)))
    return _insert(graph, place, "DequantizeLinear", [narrow, *parts], tensor.dtype)


def _insert(
    graph: ir.Graph, place: ir.Node, operator: str, inputs: list[ir.Value], dtype: ir.DataType
) -> ir.Value:
    node = ir.node(operator, inputs, name=f"{inputs[0].name}.{operator}")
    node.outputs[0].name = f"{inputs[0].name}.{operator}.y"
    node.outputs[0].type = ir.TensorType(dtype)
    graph.insert_before(place, node)
    return node.outputs[0]
