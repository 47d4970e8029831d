"""Stores weights in half the bytes where that loses nothing: 16 bits and a Cast back to float32.

Weights that were trained or published in float16 or bfloat16 have these values in float32 too. ONNX Runtime
and TensorRT fold the Cast when they load a graph, so it computes what it computed, as fast as before.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LEAST = 1024
"""Elements of the smallest tensor that is worth a node."""
NARROW = ((np.float16, TensorProto.FLOAT16), (ml_dtypes.bfloat16, TensorProto.BFLOAT16))


def compact(path: Path) -> bool:
    """Rewrites a graph in place; returns whether anything in it is narrower now.

    A graph with external data is left as it is.
    """
    if path.with_name(f"{path.name}.data").exists():
        return False
    model = onnx.load(str(path))
    graph, casts = model.graph, []
    for tensor in graph.initializer:
        narrow = _narrowed(tensor)
        if narrow is None:
            continue
        name = tensor.name
        narrow.name = f"{name}.stored"
        tensor.CopyFrom(narrow)
        casts.append(
            helper.make_node("Cast", [narrow.name], [name], name=f"{name}.Cast", to=TensorProto.FLOAT)
        )
    if not casts:
        return False
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(casts + nodes)
    onnx.save_model(model, str(path))
    return True


def _narrowed(tensor: TensorProto) -> TensorProto | None:
    """The tensor in 16 bits, or None where these do not hold its values exactly."""
    if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < LEAST:
        return None
    values = numpy_helper.to_array(tensor)
    for dtype, kind in NARROW:
        with np.errstate(over="ignore"):
            narrow = values.astype(dtype)
        if np.array_equal(narrow.astype(np.float32), values):
            return helper.make_tensor(tensor.name, kind, tensor.dims, narrow.tobytes(), raw=True)
    return None
