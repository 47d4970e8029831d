"""The project's own nodes: their function bodies in ONNX Runtime against the torch ops that they stand
for."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
inliner = pytest.importorskip("onnx.inliner")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from conceptmaster.engine.concept_config import MASKS  # noqa: E402
from conceptmaster.export.onnx_graphs import concept_node  # noqa: E402
from conceptmaster.kernels.cross_attention import (  # noqa: E402
    concept_injection,
    decoupled_cross_attention,
    padding_bias,
)

NAMES = concept_node.NODES
INJECTIONS = [name for name in NAMES if name.endswith(concept_node.INJECTION)]
BOOL = onnx.TensorProto.BOOL
OWN = {"mask": BOOL, "boxes": BOOL, "text_bias": onnx.TensorProto.FLOAT}
B, S, T, N, C, A, E = 2, 5, 4, 3, 6, 3, 8


def one_node(name, dtype=None, one_row=False, **attributes):
    """A model of one node, with its body, as the exporter would write it."""
    dtype = dtype or onnx.TensorProto.FLOAT
    function = onnx.parser.parse_function(concept_node.function_text(name, 23, one_row))
    rows = 1 if one_row else B
    sizes = {"mask": [rows, C], "boxes": [1, S, N], "text_bias": [rows, T], "q": [rows, S, A * E]}
    sizes |= {n: [rows, T, A * E] for n in ("text_k", "text_v")}
    info = onnx.helper.make_tensor_value_info
    inputs = [info(n, OWN.get(n, dtype), sizes.get(n, [rows, C, A * E])) for n in function.input]
    node = onnx.helper.make_node(
        name,
        list(function.input),
        ["out"],
        domain=concept_node.DOMAIN,
        heads=A,
        **(concept_node.FOR_TENSORRT | attributes),
    )
    graph = onnx.helper.make_graph([node], "one", inputs, [info("out", dtype, [rows, S, A * E])])
    versions = {"": 23, concept_node.DOMAIN: concept_node.VERSION}
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
    return onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)


def feed(seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = {"q": S, "text_k": T, "text_v": T, "k": C, "v": C}
    made = {name: torch.randn(B, size, A, E, generator=g) for name, size in sizes.items()}
    made["text_bias"] = padding_bias(torch.tensor([1, 3]), T, 20)
    boxes = torch.rand(1, S, N, generator=g) < 0.5
    boxes[:, 0], boxes[:, 1] = False, True  # nothing, and everything
    return made | {
        "mask": torch.tensor([[False] * C, [True, False, True, True, False, False]]),
        "boxes": boxes,
    }


def expected(name, x):
    more = {"boxes": x["boxes"]} if name.startswith(concept_node.BOXED) else {}
    if name in INJECTIONS:
        return concept_injection(x["q"], x["k"], x["v"], x["mask"], **more)
    if name.endswith(concept_node.BIASED):
        more["text_bias"] = x["text_bias"]
    return decoupled_cross_attention(*(x[n] for n in ("q", "text_k", "text_v", "k", "v", "mask")), **more)


def run(model, x):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    flat = {n: (x[n] if n in OWN else x[n].flatten(2)).numpy() for n in names}
    return session.run(None, flat)[0].reshape(-1, S, A, E)


@pytest.mark.parametrize("name", NAMES)
def test_the_body_is_the_torch_op(name, assert_close):
    x = feed()
    out = run(one_node(name), x)
    assert_close(out, expected(name, x))
    if name in INJECTIONS:
        assert not out[0].any()  # every concept masked: exactly nothing
    if name.startswith(concept_node.BOXED):  # outside of every box, too
        nothing = run(one_node(name), x | {"mask": torch.zeros(B, C, dtype=torch.bool)})
        assert (out[:, 0] == nothing[:, 0]).all() and (out[1, 1] != nothing[1, 1]).any()
        everywhere = run(one_node(name), x | {"boxes": torch.ones(1, S, N, dtype=torch.bool)})
        plain = name.removeprefix(concept_node.BOXED)
        assert (everywhere == run(one_node(plain), x)).all()


@pytest.mark.parametrize("name", INJECTIONS)
@pytest.mark.parametrize("seen", [[], [0], [5], [1, 3], range(C)])
def test_of_a_mask_of_one_row_the_keys_are_picked_out(name, seen, assert_close):
    """The others may hold anything, not a number, too; where there is none, exactly nothing comes out."""
    x = {name: value[:1] for name, value in feed().items()}
    x["mask"] = torch.isin(torch.arange(C), torch.tensor(list(seen), dtype=torch.int64))[None]
    model = one_node(name, one_row=True)
    onnx.checker.check_model(model, full_check=True)
    out = run(model, x)
    assert_close(out, expected(name, x))
    assert out.any() == bool(seen)
    if name.startswith(concept_node.BOXED):
        assert not out[:, 0].any()
    if seen:
        x |= {n: torch.where(x["mask"][:, :, None, None], x[n], torch.nan) for n in "kv"}
        assert (run(model, x) == out).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_body_runs_in_half_precision(name, assert_close):
    x = {n: v if n in OWN else v.half() for n, v in feed().items()}
    wide = {n: v if v.dtype == torch.bool else v.double() for n, v in x.items()}
    assert_close(run(one_node(name, onnx.TensorProto.FLOAT16), x), expected(name, wide), "float16")


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_key_changes_no_bit(name):
    x, other = feed(), feed()
    hidden = ~x["mask"][:, :, None, None]
    for n in "kv":
        other[n] = torch.where(hidden, torch.tensor(1e4), x[n])
    assert (run(one_node(name), x) == run(one_node(name), other)).all()


@pytest.mark.parametrize("name", NAMES)
def test_checker_and_inliner_take_it(name, assert_close):
    model = one_node(name)
    onnx.checker.check_model(model, full_check=True)
    inlined = inliner.inline_local_functions(model)
    onnx.checker.check_model(inlined, full_check=True)
    assert not inlined.functions and {n.domain for n in inlined.graph.node} == {""}
    assert_close(run(inlined, feed()), expected(name, feed()))


@pytest.mark.parametrize("name", NAMES)
def test_what_tensorrt_reads_disturbs_nobody(name):
    plain = one_node(name)
    (node,) = plain.graph.node
    extra = [a for a in node.attribute if a.name in concept_node.FOR_TENSORRT]
    assert {a.name for a in extra} == {"plugin_namespace", "aot"}
    with_extra = run(plain, feed())
    for attribute in extra:
        node.attribute.remove(attribute)
    assert (run(plain, feed()) == with_extra).all()


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_inferred_through_it_by_whoever_has_made_it(name):
    """Also in a process that has exported: what comes behind the node would have neither shape nor type."""
    schema = concept_node.operator(name).op_schema
    assert [p.name for p in schema.inputs] == list(
        onnx.parser.parse_function(concept_node.function_text(name, 23)).input
    )
    model = one_node(name)
    model.graph.node.append(onnx.helper.make_node("Neg", ["out"], ["negative"]))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("negative"))
    found = onnx.shape_inference.infer_shapes(model).graph.output[1].type.tensor_type
    assert [d.dim_value for d in found.shape.dim] == [B, S, A * E]


@pytest.mark.parametrize(
    ("injection", "whole_text", "name"),
    [
        ("standalone", None, concept_node.INJECTION),
        ("shared_query", None, concept_node.DECOUPLED),
        ("shared_query", 500, concept_node.BIASED),
    ],
)
@pytest.mark.parametrize("mask", MASKS)
def test_every_block_has_one(source_for, tmp_path, run, assert_close, injection, whole_text, name, mask):
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.onnx_graphs.trace import export_graph

    source = source_for(injection=injection, mask=mask)
    name = concept_node.BOXED + name if mask == "boxes" else name
    specs = graph_specs(source.model, source.vae, whole_text=whole_text)
    (spec,) = (s for s in specs if s.name == "denoise")
    path = tmp_path / "denoise.onnx"
    export_graph(spec, path)
    model = onnx.load(str(path))
    found = [node for node in model.graph.node if node.domain == concept_node.DOMAIN]
    assert [node.op_type for node in found] == [name] * source.model.config.transformer.num_layers
    assert [f.name for f in model.functions] == [name]
    assert not any(
        node.op_type == "Reshape" and set(node.input) & {n.output[0] for n in found}
        for node in model.graph.node
    )  # no detour behind the node
    sample = spec.sample(3)
    assert_close(run(path, sample)["next_state"], spec.run(sample)["next_state"])
    assert np.isfinite(run(path, sample)["next_state"]).all()
