"""Rewrites before TensorRT: the same numbers, and nothing left of what its builder does not take."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from onnxscript import ir  # noqa: E402

from conceptmaster.export.onnx_graphs.concept_node import DECOUPLED, DOMAIN, function_text  # noqa: E402
from conceptmaster.export.tensorrt_engines.rewrites import merge_axes, separate_queries  # noqa: E402

ATTENTION = "Attention<q_num_heads: int = 2, kv_num_heads: int = 2>"


@pytest.mark.parametrize("seed", range(20))
def test_merged_axes_are_the_same_transposition(seed):
    rng = np.random.default_rng(seed)
    sizes = [int(size) for size in rng.integers(1, 4, 9)]
    perm = [int(axis) for axis in rng.permutation(9)]
    if seed % 2:  # neighbours that stay neighbours
        perm = [0, 3, 5, 7, 8, 1, 4, 2, 6]
    fewer, order = merge_axes(sizes, perm)
    x = np.arange(np.prod(sizes))
    expected = x.reshape(sizes).transpose(perm).ravel()
    assert (x.reshape(fewer).transpose(order).ravel() == expected).all()
    assert len(fewer) <= sum(size != 1 for size in sizes)


def of_text(nodes, inputs, functions=()):
    header = f'<ir_version: 10, opset_import: ["": 23, "{DOMAIN}": 1]>'
    sizes = ", ".join(f"{kind}[{','.join(map(str, shape))}] {name}" for name, (kind, shape) in inputs.items())
    proto = onnx.parser.parse_model(f"{header} g ({sizes}) => (float[2,6,32] out) {{ {nodes} }}")
    proto.functions.extend(functions)
    return proto


def compute(proto, inputs):
    rng = np.random.default_rng(0)
    feed = {
        name: rng.standard_normal(shape).astype("f4") if kind == "float" else rng.random(shape) < 0.5
        for name, (kind, shape) in inputs.items()
    }
    return ort.InferenceSession(proto.SerializeToString()).run(None, feed)[0]


def queries(nodes):
    return [node.input[0] for node in nodes if node.op_type == "Attention"]


def test_attentions_of_a_graph_get_queries_of_their_own_and_the_same_numbers():
    sizes = {"q": ("float", (2, 6, 32))} | {name: ("float", (2, 5, 32)) for name in ("k", "v", "other")}
    nodes = f"""
        a = {ATTENTION}(q, k, v) b = {ATTENTION}(q, v, k) c = {ATTENTION}(q, other, v)
        ab = Add(a, b) out = Add(ab, c)"""
    proto = of_text(nodes, sizes)
    model = ir.from_proto(proto)
    separate_queries(model)
    rewritten = ir.to_proto(model)
    onnx.checker.check_model(rewritten, full_check=True)
    assert queries(proto.graph.node) == ["q"] * 3 and len(set(queries(rewritten.graph.node))) == 3
    np.testing.assert_allclose(compute(rewritten, sizes), compute(proto, sizes), rtol=0, atol=1e-6)


def test_the_nodes_body_gets_them_too():
    names = ("q", "text_k", "text_v", "k", "v")
    sizes = {name: ("float", (2, 6 if name == "q" else 7, 32)) for name in names} | {"mask": ("bool", (2, 7))}
    body = onnx.parser.parse_function(function_text(DECOUPLED, 23))
    nodes = f"out = {DOMAIN}.{DECOUPLED} <heads: int = 2> ({', '.join(sizes)})"
    proto = of_text(nodes, sizes, [body])
    model = ir.from_proto(proto)
    separate_queries(model)
    rewritten = ir.to_proto(model)
    onnx.checker.check_model(rewritten, full_check=True)
    assert len(set(queries(body.node))) == 1 and len(set(queries(rewritten.functions[0].node))) == 2
    np.testing.assert_allclose(compute(rewritten, sizes), compute(proto, sizes), rtol=0, atol=1e-6)
