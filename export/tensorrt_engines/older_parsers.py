"""Graphs for parsers that do not know an operator yet: it is written out in simpler ones, as ONNX defines it.

TensorRT's parser knows Attention since 10.14, RotaryEmbedding and RMSNormalization since 10.15 (its change
log). Attention that is written out is never one layer to begin with; the builder may fuse it again.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx
from onnx import inliner
from onnxscript import ir, optimizer

from .precision import forget_types

KNOWN_SINCE = {"Attention": (10, 14), "RotaryEmbedding": (10, 15), "RMSNormalization": (10, 15)}
"""Operator -> the first TensorRT whose parser takes it; newer than the oldest that engines are built with."""


def unknown_to(version: str) -> list[str]:
    """The operators that TensorRT `version` ("10.13.3") does not know."""
    numbers = tuple(int(part) for part in version.split(".")[:2])
    return [operator for operator, since in KNOWN_SINCE.items() if numbers < since]


def spell_out(path: Path, operators: Collection[str]) -> None:
    """Rewrites the graph at `path` in place, without these operators; weights beside it stay there.

    This project's own nodes are written out, too: their bodies have such operators inside. So the plugin has
    no part in such an engine.
    """
    if not operators:
        return
    proto = onnx.load(str(path), load_external_data=False)
    if proto.functions:
        proto = inliner.inline_local_functions(proto)
    proto = onnx.shape_inference.infer_shapes(proto)
    proto = inliner.inline_selected_functions(
        proto, [("", operator) for operator in operators], inline_schema_functions=True
    )
    del proto.graph.value_info[:]
    proto = onnx.shape_inference.infer_shapes(proto)
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    # an older parser wants axes and shapes as constants, which ONNX's definitions compute from shapes
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    forget_types(model)
    ir.save(model, path)
