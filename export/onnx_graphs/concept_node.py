"""The decoupled cross-attention as one node of an ONNX graph, with a function body beside it.

    conceptmaster::ConceptInjection(q, k, v, mask) -> out
    conceptmaster::DecoupledCrossAttention(q, text_k, text_v, k, v, mask) -> out
    conceptmaster::BiasedCrossAttention(q, text_k, text_v, k, v, mask, text_bias) -> out

and each of them with one more input at its end and another name:

    conceptmaster::BoxedConceptInjection(q, k, v, mask, boxes) -> out, …

q and out are [B,S,D], keys and values [B,T,D] of the text and [B,C,D] of the concepts, mask is bool [B,C]
(True: attend), text_bias float32 [B,T] whatever the others are, boxes bool [1,S,N] (see kernels/boxes.py);
the attribute `heads` is A, D = A*E. ONNX Runtime, which knows no such operator, runs the body, made of
standard operators; TensorRT, which looks for a plugin of that name first, takes the Triton kernel (see
plugin.py), for which the node says two things that nobody else reads: `plugin_namespace` and `aot`.

Letters: B batch, S video tokens, T text tokens, N concepts, C concept tokens, A heads, E head width, D = A*E.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import ir

from ...kernels import cross_attention  # noqa: F401  (registers the torch ops)

DOMAIN = "conceptmaster"
VERSION = 1
INJECTION = "ConceptInjection"
DECOUPLED = "DecoupledCrossAttention"
BIASED = "BiasedCrossAttention"
BOXED = "Boxed"
"""In front of the name of a node that takes boxes, too."""
OWN_TYPES = {"mask": "tensor(bool)", "boxes": "tensor(bool)", "text_bias": "tensor(float)"}
"""Of inputs that are not of the queries' type."""
FOR_TENSORRT: dict[str, str | int] = {"plugin_namespace": DOMAIN, "aot": 1}
"""Attributes with which TensorRT's parser finds a plugin that was compiled ahead of time."""

# A row whose mask is all False attends to everything and is then replaced by zeros: without any key it would
# be 0/0. ONNX Runtime's Attention wants a mask with an entry for every query.
_MASKED = """
    number = Cast<to: int = 6>(mask)
    axis = Constant<value_ints: ints = [1]>()
    largest = ReduceMax<keepdims: int = 1>(number, axis)
    some = Cast<to: int = 9>(largest)
    none = Not(some)
    allowed = Or(mask, none)
    middle = Constant<value_ints: ints = [1, 2]>()
    by_head = Unsqueeze(allowed, middle)
    one = Constant<value_ints: ints = [1]>()
    tokens = Shape<start: int = 1, end: int = 2>(q)
    sizes = Concat<axis: int = 0>(one, one, tokens, one)
    by_query = Expand(by_head, sizes)
    found = Attention<q_num_heads: int = @heads, kv_num_heads: int = @heads>(q, k, v, by_query)
    last = Constant<value_ints: ints = [2]>()
    row = Unsqueeze(some, last)
    zero = Constant<value_float: float = 0.0>()
    zero_alike = CastLike(zero, found)
    concepts = Where(row, found, zero_alike)
"""
# A mask of one row, as the one branch has that sees concepts, picks the keys out: time goes into those that
# are there. Without any the first stands in and is replaced by zeros.
_PICK = """
    every = Constant<value_ints: ints = [-1]>()
    flags = Reshape(mask, every)
    number = Cast<to: int = 6>(flags)
    largest = ReduceMax<keepdims: int = 1>(number)
    some = Cast<to: int = 9>(largest)
    none = Not(some)
    count = Size(flags)
    nought = Constant<value_int: int = 0>()
    step = Constant<value_int: int = 1>()
    places = Range(nought, count, step)
    first = Equal(places, nought)
    stand_in = And(first, none)
    kept = Or(flags, stand_in)
    keys = Compress<axis: int = 1>(k, kept)
    values = Compress<axis: int = 1>(v, kept)
"""
_PICKED = f"""{_PICK}
    found = Attention<q_num_heads: int = @heads, kv_num_heads: int = @heads>(q, keys, values)
    zero = Constant<value_float: float = 0.0>()
    zero_alike = CastLike(zero, found)
    out = Where(some, found, zero_alike)
"""
_BODIES = {
    INJECTION: ("q, k, v, mask", f"{_MASKED} out = Identity(concepts)"),
    DECOUPLED: (
        "q, text_k, text_v, k, v, mask",
        f"""{_MASKED}
    text = Attention<q_num_heads: int = @heads, kv_num_heads: int = @heads>(q, text_k, text_v)
    out = Add(text, concepts)""",
    ),
    BIASED: (
        "q, text_k, text_v, k, v, mask, text_bias",
        f"""{_MASKED}
    bias_alike = CastLike(text_bias, q)
    bias_by_head = Unsqueeze(bias_alike, middle)
    bias_by_query = Expand(bias_by_head, sizes)
    text = Attention<q_num_heads: int = @heads, kv_num_heads: int = @heads>(q, text_k, text_v, bias_by_query)
    out = Add(text, concepts)""",
    ),
}
# Boxes of concepts, [1,S,N], as boxes of their keys, [1,S,C].
_BY_KEY = """
    one = Constant<value_ints: ints = [1]>()
    all_keys = Shape<start: int = 1, end: int = 2>(k)
    all_concepts = Shape<start: int = 2, end: int = 3>(boxes)
    each = Div(all_keys, all_concepts)
    fourth = Constant<value_ints: ints = [3]>()
    apart = Unsqueeze(boxes, fourth)
    times = Concat<axis: int = 0>(one, one, one, each)
    spread = Expand(apart, times)
    tokens = Shape<start: int = 0, end: int = 2>(boxes)
    flat = Concat<axis: int = 0>(tokens, all_keys)
    by_key = Reshape(spread, flat)
"""
# As `_MASKED`, where each query has a mask of its own.
_BOXES = f"""{_BY_KEY}
    by_row = Unsqueeze(mask, one)
    inside = And(by_row, by_key)
    number = Cast<to: int = 6>(inside)
    last = Constant<value_ints: ints = [2]>()
    largest = ReduceMax<keepdims: int = 1>(number, last)
    some = Cast<to: int = 9>(largest)
    none = Not(some)
    allowed = Or(inside, none)
    by_query = Unsqueeze(allowed, one)
    found = Attention<q_num_heads: int = @heads, kv_num_heads: int = @heads>(q, k, v, by_query)
    zero = Constant<value_float: float = 0.0>()
    zero_alike = CastLike(zero, found)
    concepts = Where(some, found, zero_alike)
    middle = Constant<value_ints: ints = [1, 2]>()
    rows = Shape<start: int = 1, end: int = 2>(q)
    sizes = Concat<axis: int = 0>(one, one, rows, one)
"""
# As `_PICKED`; a query that sees none of the keys that are left attends to all of them.
_PICKED_BOXES = f"""{_BY_KEY}{_PICK}
    inside = Compress<axis: int = 2>(by_key, kept)
    numbers = Cast<to: int = 6>(inside)
    last = Constant<value_ints: ints = [2]>()
    highest = ReduceMax<keepdims: int = 1>(numbers, last)
    any = Cast<to: int = 9>(highest)
    not_any = Not(any)
    allowed = Or(inside, not_any)
    by_query = Unsqueeze(allowed, one)
    found = Attention<q_num_heads: int = @heads, kv_num_heads: int = @heads>(q, keys, values, by_query)
    shown = And(any, some)
    zero = Constant<value_float: float = 0.0>()
    zero_alike = CastLike(zero, found)
    out = Where(shown, found, zero_alike)
"""
_BODIES |= {
    BOXED + name: (f"{inputs}, boxes", body.replace(_MASKED, _BOXES))
    for name, (inputs, body) in _BODIES.items()
}
_OF_ONE_ROW = {INJECTION: _PICKED, BOXED + INJECTION: _PICKED_BOXES}
NODES = tuple(_BODIES)


@functools.cache
def function_text(name: str, opset: int, one_row: bool = False) -> str:
    """The body of one of the nodes in ONNX's text form, in this opset (23 at least).

    one_row: for an injection whose mask has one row. It is faster, and has sizes that are known only
    when it runs.
    """
    inputs, body = _BODIES[name]
    if one_row:
        body = _OF_ONE_ROW.get(name, body)
    header = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>'
    return f"{header}\n{name}<heads>({inputs}) => (out)\n{{{body}\n}}"


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch's exporter, which must run under `kept_whole`: op -> what makes its node."""
    from onnxscript import opset23 as standard

    def injection(q: Any, k: Any, v: Any, mask: Any, boxes: Any) -> Any:
        heads, flat = _flattened(standard, q, k, v)
        name, more = (INJECTION, []) if boxes is None else (BOXED + INJECTION, [boxes])
        found = operator(name)(*flat, mask, *more, heads=heads, **FOR_TENSORRT)
        return standard.Reshape(found, _sizes(q))

    def decoupled(
        q: Any,
        text_k: Any,
        text_v: Any,
        k: Any,
        v: Any,
        mask: Any,
        inverse_rms: Any,
        text_bias: Any,
        boxes: Any,
    ) -> Any:
        if inverse_rms is not None:
            raise NotImplementedError("the node has no inverse_rms")
        heads, flat = _flattened(standard, q, text_k, text_v, k, v)
        name, more = (DECOUPLED, []) if text_bias is None else (BIASED, [text_bias])
        if boxes is not None:
            name, more = BOXED + name, [*more, boxes]
        found = operator(name)(*flat, mask, *more, heads=heads, **FOR_TENSORRT)
        return standard.Reshape(found, _sizes(q))

    ops = torch.ops.conceptmaster
    return {ops.concept_injection.default: injection, ops.decoupled_cross_attention.default: decoupled}


def add_functions(model: ir.Model) -> None:
    """Puts the bodies of the nodes that `model` has beside its graph.

    What the tracer leaves behind each node, a Reshape to [B,S,A,E] and back to [B,S,D], goes on the way.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    if not nodes:
        return
    for node in nodes:
        _drop_reshape(node)
    opset = model.opset_imports[""]
    model.opset_imports[DOMAIN] = VERSION
    one_row = all(node.inputs[3].shape[0] == 1 for node in nodes if node.op_type in _OF_ONE_ROW)
    for name in sorted({node.op_type for node in nodes}):
        _put(model, name, function_text(name, opset, one_row))


def fix_sizes(model: ir.Model) -> None:
    """Gives the nodes bodies whose sizes are known beforehand, as TensorRT wants them."""
    for domain, name, _ in list(model.functions):
        if domain == DOMAIN:
            _put(model, name, function_text(name, model.opset_imports[""]))


def _put(model: ir.Model, name: str, text: str) -> None:
    function = ir.from_proto(onnx.parser.parse_function(text))
    model.functions[function.identifier()] = function


def _drop_reshape(node: ir.Node) -> None:
    """Takes away a Reshape of the node's output, [B,S,D], to that same shape."""
    out, q = node.outputs[0], node.inputs[0]
    assert q is not None
    for user, _ in list(out.uses()):
        value = user.outputs[0]
        if user.op_type == "Reshape" and value.shape == q.shape:
            out.shape, out.type = value.shape, value.type
            value.replace_all_uses_with(out)


@functools.cache
def operator(name: str) -> Any:
    """One of the nodes as onnxscript calls it.

    Its schema is not registered with onnx: who finds one there does not look into the function body, and
    shape inference would end at the first node.
    """
    from onnx import defs
    from onnxscript.values import Op, Opset

    parameters = [
        defs.OpSchema.FormalParameter(x, OWN_TYPES.get(x, "T")) for x in _BODIES[name][0].split(", ")
    ]
    kinds = {"heads": "INT", "plugin_namespace": "STRING", "aot": "INT"}
    schema = defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=parameters,
        outputs=[defs.OpSchema.FormalParameter("out", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[
            defs.OpSchema.Attribute(key, getattr(defs.OpSchema.AttrType, kind), required=True)
            for key, kind in kinds.items()
        ],
    )
    return Op(Opset(DOMAIN, VERSION), name, schema)


def _sizes(x: Any) -> list[int]:
    return [int(size) for size in x.shape]


def _flattened(standard: Any, *tensors: Any) -> tuple[int, list[Any]]:
    """[B,·,A,E] each -> A and the tensors as [B,·,D]."""
    flat = []
    for x in tensors:
        batch, tokens, heads, width = _sizes(x)
        flat.append(standard.Reshape(x, [batch, tokens, heads * width]))
    return heads, flat
