"""fp8: which numbers are rounded, by which scales, and what that costs; and the ranges behind the scales."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from onnxscript import ir  # noqa: E402

from conceptmaster.cli import main  # noqa: E402
from conceptmaster.errors import ExportError  # noqa: E402
from conceptmaster.export.tensorrt_engines import calibrate as calibrating  # noqa: E402
from conceptmaster.export.tensorrt_engines.fp8 import LARGEST, linears, quantise_linears, scale_for  # noqa: E402
from conceptmaster.export.tensorrt_engines.precision import prepare, reduce  # noqa: E402
from conceptmaster.kernels.tolerances import RELATIVE_L2  # noqa: E402
from conceptmaster.runtime.bundle_format.find import SHIPPED, Bundle  # noqa: E402

BUNDLE = SHIPPED / "sprites"
# Of a step's estimate of the latents, relative L2. Measured: 0.10, and 0.013 in bf16. The shipped model may
# change, so there is room.
TOLERANCE = 0.2


@pytest.fixture(scope="module")
def calibration():
    return calibrating.calibrate(Bundle.open(BUNDLE))


@pytest.mark.parametrize("most", [1e-6, 0.3, 1.0, 447.9, 448.0, 448.1, 3e4])
def test_scales_are_the_smallest_power_of_two_that_fits(most):
    scale = scale_for(most)
    assert np.log2(scale) == round(np.log2(scale))
    assert LARGEST / 2 < most / scale <= LARGEST
    assert scale_for(0.0) == 1.0


def rounded(x, most):
    """By PyTorch: x in float8_e4m3fn, at the scale for `most`."""
    scale = scale_for(most)
    x = torch.from_numpy(x) / scale
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float().numpy() * np.float32(scale)


def test_one_product_is_that_of_rounded_numbers(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((256, 64)).astype(np.float32)
    info = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="t.blocks.0.to_q.MatMul"),
        onnx.helper.make_node("MatMul", ["y", "v"], ["z"], name="t.proj_out.MatMul"),
    ]
    weights = [onnx.numpy_helper.from_array(a, n) for n, a in (("w", weight), ("v", np.eye(64, dtype="f4")))]
    sides = ([info("x", 1, [48, 256])], [info("z", 1, [48, 64])])
    graph = onnx.helper.make_graph(nodes, "g", *sides, weights)
    opset = [onnx.helper.make_opsetid("", 23)]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10))
    assert [node.name for node in linears(model)] == ["t.blocks.0.to_q.MatMul"]
    quantise_linears(model, {"t.blocks.0.to_q.MatMul": 2.0})
    x = rng.standard_normal((48, 256)).astype(np.float32)
    x[0, 0] = 1e3  # far beyond what the calibration saw: it is cut off
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    expected = rounded(x, 8.0) @ rounded(weight, float(abs(weight).max()))
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-3)
    x[0, 0] = 0
    error = np.linalg.norm(session.run(None, {"x": x})[0] - x @ weight) / np.linalg.norm(x @ weight)
    assert error < RELATIVE_L2["linear8"]


def test_ranges_are_those_of_the_graph_as_it_runs(calibration):
    model = ir.load(BUNDLE / "denoise.onnx")
    assert set(calibration.largest["denoise"]) == {node.name for node in linears(model)}
    layers = sum("ffn.net.2" in name for name in calibration.largest["denoise"])
    assert len(calibration.largest["denoise"]) == 10 * layers  # ten matrices a block
    assert all(0 < most < 1e4 for most in calibration.largest["denoise"].values())
    same = [calibration.largest["denoise"][f"transformer.blocks.0.attn1.to_{x}.MatMul"] for x in "qkv"]
    assert len(set(same)) == 1  # they read one tensor


def test_the_error_is_stated(calibration):
    assert 0.01 < calibration.error < TOLERANCE


def test_the_graph_has_8_bits_around_each_matrix_and_nowhere_else(calibration, tmp_path):
    target = tmp_path / "graph.onnx"
    prepare(BUNDLE / "denoise.onnx", target, "fp8", calibration.largest["denoise"])
    onnx.checker.check_model(str(target), full_check=True)
    model = onnx.load(str(target))
    made = {name: node for node in model.graph.node for name in node.output}
    stored = {t.name: t.data_type for t in model.graph.initializer}
    matrices = [node for node in model.graph.node if node.name in calibration.largest["denoise"]]
    assert len(matrices) == len(calibration.largest["denoise"])
    for node in matrices:
        x, weight = (made[name] for name in node.input)
        assert x.op_type == weight.op_type == "DequantizeLinear"
        assert made[x.input[0]].op_type == "QuantizeLinear"
        assert stored[weight.input[0]] == onnx.TensorProto.FLOAT8E4M3FN
        assert {stored[n.input[1]] for n in (x, weight)} == {onnx.TensorProto.BFLOAT16}
    dequantised = {name for name, node in made.items() if node.op_type == "DequantizeLinear"}
    users = [node for node in model.graph.node if dequantised.intersection(node.input)]
    assert {node.name for node in users} == set(calibration.largest["denoise"])


def test_other_graphs_are_in_bf16(tmp_path):
    for precision in ("fp8", "bf16"):
        prepare(BUNDLE / "condition.onnx", tmp_path / f"{precision}.onnx", precision)
    assert (tmp_path / "fp8.onnx").read_bytes() == (tmp_path / "bf16.onnx").read_bytes()


def test_a_range_that_is_missing_is_named(calibration):
    model = ir.load(BUNDLE / "denoise.onnx")
    some = dict(list(calibration.largest["denoise"].items())[1:])
    with pytest.raises(ExportError, match="goes into 'transformer.blocks.0.attn1.to_k.MatMul', which is not"):
        reduce(model, "fp8", some, emulate=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "sm_80", "--flavor", "rtx"], "fp8 needs sm_89 or newer, not sm_80: choose --precision"),
        (["--target", "sm_80", "--trtexec", "--dry-run"], "fp8 needs sm_89 or newer"),
        (
            ["--target", "sm_90", "--trtexec", "--dry-run", "--request", "nothing.json"],
            "cannot read the request",
        ),
        (["--request", "nothing.json", "--precision", "bf16"], "--request goes with --precision fp8"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, capsys):
    if "rtx" in arguments:
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert main(["build", "sprites", "--precision", "fp8", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
