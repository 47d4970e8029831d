"""A bundle's graphs with deltas handed in (custom.py), changed in memory for ONNX Runtime: the text encoder
gets new words, `condition` other keys and values of the text.

The only file of the runtime that imports onnx, where a delta is handed in and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ...delta_file import EXTRA, added, check_base
from ...errors import InputError, how_to_install, not_loaded
from ..bundle_format.graph_list import BY_NAME, EACH_TEXT
from ..custom import Custom

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except (ImportError, MemoryError) as error:
    raise not_loaded("a delta beside a bundle", how_to_install(EXTRA), error) from error

MOST = 1_500_000_000  # bytes of new weights; protobuf ends at 2 GiB
IDS = "token_ids"
EXPERTS = {1: "transformer", 2: "transformer_2"}


def changes(graph: str) -> bool:
    """Whether a delta changes the graph of that name."""
    return BY_NAME[graph].runs == EACH_TEXT or graph.startswith("condition")


def changed(path: Path, graph: str, custom: Custom) -> bytes:
    """The graph at `path` with deltas, serialised; weights beside it stay there. Raises InputError, one line,
    for a delta of another base, and for a graph that none can change."""
    model = onnx.load(str(path), load_external_data=False)
    if BY_NAME[graph].runs == EACH_TEXT:
        _add_words(model.graph, custom)
    else:
        _add_changes(model.graph, EXPERTS[BY_NAME[graph].expert], custom, path.parent)
    return model.SerializeToString()


def _add_words(graph: onnx.GraphProto, custom: Custom) -> None:
    """New words' ids are read from a table of their own: that of the base stays, wherever it lies."""
    gather = next((n for n in graph.node if n.op_type == "Gather" and n.input[1] == IDS), None)
    if gather is None:
        raise InputError("the bundle's text encoder takes no new words: merge the delta at export")
    table = np.stack(list(custom.words.values())).astype(np.float32)
    constants = {"first": np.int64(custom.first), "none": np.int64(0), "table": table, "axis": np.array([-1])}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"words.{name}"))
    place = list(graph.node).index(gather)
    behind = next((n for n in graph.node if n.op_type == "Cast" and n.input[0] == gather.output[0]), gather)
    out = behind.output[0]
    behind.output[0] = "words.known"
    gather.input[1] = "words.known_ids"
    before = [
        helper.make_node("GreaterOrEqual", [IDS, "words.first"], ["words.new"]),
        helper.make_node("Where", ["words.new", "words.none", IDS], ["words.known_ids"]),
        helper.make_node("Sub", [IDS, "words.first"], ["words.places"]),
        helper.make_node("Where", ["words.new", "words.places", "words.none"], ["words.own_ids"]),
        helper.make_node("Gather", ["words.table", "words.own_ids"], ["words.own"]),
        helper.make_node("Unsqueeze", ["words.new", "words.axis"], ["words.where"]),
    ]
    after = helper.make_node("Where", ["words.where", "words.own", "words.known"], [out])
    nodes = [*graph.node[:place], *before, *graph.node[place:]]
    nodes.insert(nodes.index(behind) + 1, after)
    del graph.node[:]
    graph.node.extend(nodes)


def _add_changes(graph: onnx.GraphProto, transformer: str, custom: Custom, folder: Path) -> None:
    """Matrices of keys and values become their sums with the changes, in float32."""
    nodes = {node.name: node for node in graph.node if node.op_type == "MatMul"}
    found = dict(_weights(graph, nodes, folder))
    shapes = {name: read().shape for name, read in found.items()}
    check_base(custom.deltas, transformer, shapes, found)
    sums = added(custom.deltas, transformer)
    if sum(change.nbytes for change in sums.values()) > MOST:
        raise InputError("the delta is too large to be handed in beside a bundle: merge it at export")
    for name, change in sums.items():
        value = np.ascontiguousarray((found[name]() + change).T)
        graph.initializer.append(numpy_helper.from_array(value, f"{name}.changed"))
        nodes[_node(name)].input[1] = f"{name}.changed"
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _weights(
    graph: onnx.GraphProto, nodes: dict[str, onnx.NodeProto], folder: Path
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """What gives the matrices that the text's keys and values are made with, float32 [out,in] as PyTorch has
    them, by their names there."""
    held = {tensor.name: tensor for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node if node.op_type in ("Cast", "Transpose")}
    for name, node in nodes.items():
        if not name.startswith("transformer.") or ".attn2.to_" not in name:
            continue
        source, turned = node.input[1], True
        while source in made:
            turned ^= made[source].op_type == "Transpose"
            source = made[source].input[0]
        if source in held:
            weight = name.removeprefix("transformer.").removesuffix(".MatMul") + ".weight"
            yield weight, partial(_matrix, held[source], turned, folder)


def _matrix(tensor: TensorProto, turned: bool, folder: Path) -> np.ndarray:
    value = numpy_helper.to_array(tensor, str(folder)).astype(np.float32)
    return value.T if turned else value


def _node(weight: str) -> str:
    return f"transformer.{weight.removesuffix('.weight')}.MatMul"
