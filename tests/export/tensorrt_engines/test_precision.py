"""What TensorRT's parser is given: fewer axes, and products in 16 bits, each held to the graph before."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from onnxscript import ir  # noqa: E402

from conceptmaster.errors import ExportError, InputError  # noqa: E402
from conceptmaster.export.tensorrt_engines import precision as preparing  # noqa: E402
from conceptmaster.export.tensorrt_engines.precision import prepare  # noqa: E402
from conceptmaster.export.tensorrt_engines.rewrites import MAX_AXES  # noqa: E402
from conceptmaster.export.verify import relative_error  # noqa: E402
from conceptmaster.runtime.bundle_format.find import SHIPPED  # noqa: E402

BUNDLE = SHIPPED / "sprites"
GRAPHS = sorted(path.stem for path in BUNDLE.glob("*.onnx"))
# Relative error of a whole graph whose products are rounded, on random inputs. Measured on `sprites`: see
# docs/tensorrt.md.
TOLERANCES = {"fp16": 2e-2, "bf16": 1.2e-1}


def feed(path, seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if dtype == np.float32:
            made[value.name] = rng.standard_normal(shape).astype(np.float32)
        else:
            made[value.name] = np.ones(shape, dtype)
    return made


def run(path, inputs):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.parametrize("graph", GRAPHS)
def test_fp32_is_the_same_computation_in_at_most_eight_axes(graph, tmp_path):
    source, target = BUNDLE / f"{graph}.onnx", tmp_path / "graph.onnx"
    prepare(source, target, "fp32")
    for a, b in zip(run(source, feed(source)), run(target, feed(source)), strict=True):
        assert (a == b).all()
    model = onnx.load(str(target))
    sizes = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    reshapes = [sizes[n.input[1]] for n in model.graph.node if n.op_type == "Reshape" and n.input[1] in sizes]
    assert all(len(shape) <= MAX_AXES for shape in reshapes)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_products_in_16_bits_are_close(graph, precision, tmp_path):
    source, target = BUNDLE / f"{graph}.onnx", tmp_path / "graph.onnx"
    prepare(source, target, precision)
    onnx.checker.check_model(str(target), full_check=True)
    kind = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    model = onnx.shape_inference.infer_shapes(onnx.load(str(target)))
    known = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    known |= {t.name: t.data_type for t in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type in preparing.PRODUCTS]
    assert products and {known[n.input[1]] for n in products} == {kind}
    first, second = (onnx.load(str(p), load_external_data=False).graph for p in (source, target))
    for a, b in ((first.input, second.input), (first.output, second.output)):
        assert [(v.name, v.type) for v in a] == [(v.name, v.type) for v in b]
    # bf16 does not run on ONNX Runtime's CPU: the same rounding, computed in float32
    emulated = ir.load(source)
    preparing.narrow(emulated, precision, emulate=True)
    ir.save(emulated, tmp_path / "emulated.onnx")
    expected = run(source, feed(source))
    paths = [tmp_path / "emulated.onnx"] + ([target] if precision == "fp16" else [])
    for path in paths:
        for a, b in zip(run(path, feed(source)), expected, strict=True):
            assert relative_error(a, b) <= TOLERANCES[precision]


def test_int8_is_refused_by_name(tmp_path):
    source = SHIPPED / "sprites-int8" / "denoise.onnx"
    with pytest.raises(
        InputError, match=r"is in int8 for CPUs: TensorRT takes neither its node '.*QuantizeLinear'"
    ):
        prepare(source, tmp_path / "graph.onnx", "bf16")


def test_a_product_of_something_unknown_is_told_and_not_left_in_float32():
    helper = onnx.helper
    nodes = [
        helper.make_node("Odd", ["x"], ["y"], domain="odd"),
        helper.make_node("MatMul", ["y", "y"], ["z"], name="product"),
    ]
    sides = [[helper.make_tensor_value_info(name, 1, [4, 4])] for name in "xz"]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("odd", 1)]
    model = ir.from_proto(helper.make_model(helper.make_graph(nodes, "g", *sides), opset_imports=opsets))
    with pytest.raises(ExportError, match=r"into the node 'product' \(MatMul\) is of unknown shape or type"):
        preparing.narrow(model, "bf16", emulate=False)


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown precision 'int4': choose one of fp32, fp16, bf16, fp8"):
        prepare(BUNDLE / "dam.onnx", tmp_path / "graph.onnx", "int4")


def test_a_weight_that_fp16_cannot_hold_is_named(tmp_path):
    model = onnx.load(str(BUNDLE / "dam.onnx"))
    weight = next(t for t in model.graph.initializer if len(t.dims) == 2 and "stored" in t.name)
    values = onnx.numpy_helper.to_array(weight).astype(np.float32)
    values[0, 0] = 1e6
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save_model(model, str(tmp_path / "large.onnx"))
    with pytest.raises(InputError, match="values up to 1.0e.06, too large for float16: choose bf16"):
        prepare(tmp_path / "large.onnx", tmp_path / "graph.onnx", "fp16")


def beside(source, folder):
    """The graph with its weights in a file beside it, as bundles of big bases have them."""
    folder.mkdir()
    path = folder / source.name
    model = ir.load(source)
    ir.save(model, path, external_data=f"{path.name}.data")
    return path


@pytest.mark.parametrize("precision", preparing.PRECISIONS[:3])
def test_weights_beside_the_graph_give_the_same_graph(precision, tmp_path):
    source = BUNDLE / "denoise.onnx"
    outside = beside(source, tmp_path / "bundle")
    kept = {path.name: path.read_bytes() for path in outside.parent.iterdir()}
    prepare(source, tmp_path / "inside.onnx", precision)
    prepare(outside, tmp_path / "outside.onnx", precision)
    assert (tmp_path / "outside.onnx.data").is_file() and not (tmp_path / "inside.onnx.data").exists()
    assert {path.name: path.read_bytes() for path in outside.parent.iterdir()} == kept
    a, b = (onnx.load(str(tmp_path / f"{name}.onnx")) for name in ("inside", "outside"))
    assert list(a.graph.node) == list(b.graph.node)
    weights = [{t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer} for m in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(value, weights[1][name]) for name, value in weights[0].items())


def test_weights_beside_the_graph_are_never_all_in_memory(tmp_path):
    import tracemalloc

    outside = beside(BUNDLE / "denoise.onnx", tmp_path / "bundle")
    prepare(outside, tmp_path / "first.onnx", "fp16")  # what is loaded once and stays
    total = (tmp_path / "first.onnx.data").stat().st_size
    tracemalloc.start()
    prepare(outside, tmp_path / "again.onnx", "bf16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 2e7 and peak < total / 2
