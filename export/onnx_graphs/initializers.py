"""Constants of a graph: what they hold, whichever way they are stored, and new ones.

A weight may be in the graph or in the file beside it, in float32 or in 16 bits with a Cast behind it. None is
held in memory here: what is computed from one is computed when the graph is written, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnxscript import ir


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """An initializer's tensor, or that of one that was stored in fewer bits and is cast to float32; None for
    what is computed."""
    if value is None:
        return None
    node = value.producer()
    if node is None:
        return value.const_value
    if node.op_type != "Cast" or node.inputs[0] is None or node.inputs[0].producer() is not None:
        return None
    return node.inputs[0].const_value


def add(graph: ir.Graph, name: str, tensor: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """A new initializer of `graph`."""
    held = ir.tensor(tensor, name=name) if isinstance(tensor, np.ndarray) else tensor
    value = ir.Value(name=name, const_value=held, shape=held.shape, type=ir.TensorType(held.dtype))
    graph.register_initializer(value)
    return value


def later(
    name: str, tensor: ir.TensorProtocol, dtype: np.dtype, compute: Callable[[np.ndarray], np.ndarray]
) -> ir.LazyTensor:
    """`compute` of `tensor`, of the same shape and of `dtype`, each time that somebody asks for it."""
    return ir.LazyTensor(
        lambda: ir.tensor(compute(tensor.numpy()), name=name),
        dtype=ir.DataType.from_numpy(dtype),
        shape=ir.Shape(tensor.shape),
        name=name,
    )
