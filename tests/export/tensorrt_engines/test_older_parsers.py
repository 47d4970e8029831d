"""Operators written out for older parsers: the same numbers, and none of them left."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from conceptmaster.export.tensorrt_engines.older_parsers import KNOWN_SINCE, spell_out, unknown_to  # noqa: E402
from conceptmaster.export.tensorrt_engines.precision import prepare  # noqa: E402
from conceptmaster.export.verify import relative_error  # noqa: E402
from conceptmaster.runtime.bundle_format.find import SHIPPED  # noqa: E402


@pytest.mark.parametrize(
    ("version", "operators"),
    [
        ("10.13", set(KNOWN_SINCE)),
        ("10.13.3", set(KNOWN_SINCE)),
        ("10.14.1", {"RotaryEmbedding", "RMSNormalization"}),
        ("10.15.1", set()),
        ("11.4.0", set()),
    ],
)
def test_what_a_version_lacks(version, operators):
    assert set(unknown_to(version)) == operators


def run(path, feed):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def feed(path):
    rng = np.random.default_rng(0)
    made = {}
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        is_mask = value.type.tensor_type.elem_type == onnx.TensorProto.BOOL
        made[value.name] = np.ones(shape, bool) if is_mask else rng.standard_normal(shape, np.float32)
    return made


def operators(path):
    model = onnx.load(str(path), load_external_data=False)
    assert not model.functions and {node.domain for node in model.graph.node} == {""}
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("name", ["sprites", "with the node"])
def test_the_numbers_stay(name, bundle, tmp_path):
    source = {"sprites": SHIPPED / "sprites", "with the node": bundle}[name] / "denoise.onnx"
    target = tmp_path / "graph.onnx"
    prepare(source, target, "fp32")
    spell_out(target, unknown_to("10.13"))
    onnx.checker.check_model(str(target), full_check=True)
    assert not operators(target) & set(KNOWN_SINCE)
    inputs = feed(source)
    for a, b in zip(run(target, inputs), run(source, inputs), strict=True):
        assert relative_error(a, b) < 2e-5


def test_weights_beside_the_graph_stay_where_they_are(tmp_path):
    source, target = SHIPPED / "sprites" / "dam.onnx", tmp_path / "graph.onnx"
    onnx.save_model(
        onnx.load(str(source)), str(target), save_as_external_data=True, location="graph.onnx.data"
    )
    weights = (tmp_path / "graph.onnx.data").read_bytes()
    spell_out(target, unknown_to("10.13"))
    assert (tmp_path / "graph.onnx.data").read_bytes() == weights
    inputs = feed(source)
    for a, b in zip(run(target, inputs), run(source, inputs), strict=True):
        assert relative_error(a, b) < 2e-5


def test_nothing_to_write_out_changes_nothing(tmp_path):
    target = tmp_path / "dam.onnx"
    shutil.copy(SHIPPED / "sprites" / "dam.onnx", target)
    before = target.read_bytes()
    spell_out(target, unknown_to("11.4.0"))
    assert target.read_bytes() == before


def test_a_parser_takes_it(tmp_path):
    """TensorRT for RTX, which knows these operators, does as well without them."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    target = tmp_path / "graph.onnx"
    prepare(SHIPPED / "sprites" / "denoise.onnx", target, "bf16")
    spell_out(target, unknown_to("10.13"))
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, log).parse_from_file(str(target))
    kinds = {network.get_layer(i).type for i in range(network.num_layers)}
    assert trt.LayerType.ATTENTION_INPUT not in kinds
