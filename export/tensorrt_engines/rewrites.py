"""What a graph is rewritten for before TensorRT takes it, whatever its precision; the numbers stay the same.

Tensors have at most 8 axes, and no two attentions read the same queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxscript import ir
from onnxscript.ir.passes.common import RemoveUnusedNodesPass

from ..onnx_graphs import initializers
from ..onnx_graphs.initializers import constant

MAX_AXES = 8
"""TensorRT's Dims::MAX_DIMS."""


def lower_ranks(model: ir.Model) -> None:
    """Rewrites Reshape, Transpose, Reshape over more than MAX_AXES axes to fewer: patches come with nine.

    Axes of size one go, and axes that stay neighbours become one.
    """
    for node in list(model.graph):
        if node.op_type != "Transpose":
            continue
        before, perm = node.inputs[0].producer() if node.inputs[0] else None, _perm(node)
        if before is None or before.op_type != "Reshape" or len(perm) <= MAX_AXES:
            continue
        sizes = constant(before.inputs[1])
        users = [user for user, _ in node.outputs[0].uses()]
        if (
            sizes is None
            or any(user.op_type != "Reshape" for user in users)
            or len(before.outputs[0].uses()) > 1
        ):
            continue
        fewer, order = merge_axes([int(size) for size in sizes.numpy()], perm)
        shape = initializers.add(model.graph, f"{node.name}.axes", np.array(fewer, np.int64))
        before.replace_input_with(1, shape)
        node.attributes["perm"] = ir.AttrInt64s("perm", order)
        before.outputs[0].shape = node.outputs[0].shape = None
    RemoveUnusedNodesPass()(model)


def merge_axes(sizes: Sequence[int], perm: Sequence[int]) -> tuple[list[int], list[int]]:
    """(sizes, perm) of a transposition -> the same one over fewer axes."""
    kept = [axis for axis in perm if sizes[axis] != 1]
    groups: list[list[int]] = []
    rank = {axis: place for place, axis in enumerate(sorted(kept))}
    for axis in kept:
        if groups and rank[axis] == rank[groups[-1][-1]] + 1:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    first = sorted(groups)  # in the order that the axes lie in memory
    order = [first.index(group) for group in groups]
    return [int(np.prod([sizes[axis] for axis in group])) for group in first], order


def separate_queries(model: ir.Model) -> None:
    """Gives every Attention, in the graph and in the nodes' function bodies, queries of its own.

    Where two read the same ones, as the text's and the concepts' do in `DecoupledCrossAttention`, the builder
    of TensorRT for RTX 1.7.1 dies of a segmentation fault: two Attention nodes and nothing else are enough.
    A copy is no cure, since the builder sees through it. So the second one's queries are halved and its keys
    doubled, which rounds nothing; a third one's would be quartered.
    """
    for place in (model.graph, *model.functions.values()):
        readers: dict[ir.Value, int] = {}
        for node in list(place):
            if node.op_type != "Attention" or node.domain:
                continue
            queries, keys = node.inputs[:2]
            assert queries is not None and keys is not None
            before = readers[queries] = readers.get(queries, -1) + 1
            if before:
                node.replace_input_with(0, _times(place, node, queries, 0.5**before))
                node.replace_input_with(1, _times(place, node, keys, 2.0**before))


def _times(place: ir.Graph | ir.Function, reader: ir.Node, value: ir.Value, factor: float) -> ir.Value:
    """`value` times `factor`, in the dtype that it has, for `reader`."""
    number = ir.node("Constant", [], attributes={"value_float": factor})
    alike = ir.node("CastLike", [number.outputs[0], value])
    product = ir.node("Mul", [value, alike.outputs[0]])
    for node in (number, alike, product):
        node.name = f"{reader.outputs[0].name}.{value.name}.{factor}.{node.op_type}"
        node.outputs[0].name = f"{node.name}.y"
    place.insert_before(reader, [number, alike, product])
    return product.outputs[0]


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())
