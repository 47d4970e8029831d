"""Half the bytes, the same numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from conceptmaster.export.onnx_graphs.weights_16bit import narrow_in_place

RNG = np.random.default_rng(0)
FULL = RNG.standard_normal((64, 64)).astype(np.float32)


def graph(path, weights):
    """y = x @ weights, written to `path`."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 64]) for name in "xy")
    made = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weights, "w")])
    onnx.save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)]), str(path))


def run(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 64)})[0]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_of_16_bits_are_stored_in_16_bits_and_compute_the_same(dtype, tmp_path):
    path = tmp_path / "g.onnx"
    graph(path, FULL.astype(dtype).astype(np.float32))
    before, size = run(path), path.stat().st_size
    assert narrow_in_place(path)
    onnx.checker.check_model(str(path), full_check=True)
    assert path.stat().st_size < 0.6 * size
    np.testing.assert_array_equal(run(path), before)
    assert not narrow_in_place(path), "what is narrow already stays"


def test_values_that_16_bits_do_not_hold_stay(tmp_path):
    path = tmp_path / "g.onnx"
    for weights in (FULL, np.where(FULL > 3, np.float32(1e-30 / 3), 1.0).astype(np.float32)):
        graph(path, weights)
        before = path.read_bytes()
        assert not narrow_in_place(path) and path.read_bytes() == before
