"""One graph to one engine, with fakes of TensorRT 10.13 to 11: what the library is told, and what it says."""

from __future__ import annotations

import enum
import sys
import types

import pytest

pytest.importorskip("onnxscript")

from conceptmaster.errors import ExportError, MissingDependency  # noqa: E402
from conceptmaster.export.tensorrt_engines import builder  # noqa: E402
from conceptmaster.export.tensorrt_engines.builder import Limits  # noqa: E402

VERSIONS = ("10.13.3.9", "10.14.1.48", "11.4.0.106")


class Attention:
    decomposable = False


class Layer:
    def __init__(self, trt, name, dtype, width):
        self.name = name
        self.type = trt.LayerType.ATTENTION_INPUT if hasattr(trt.LayerType, "ATTENTION_INPUT") else None
        self.q = types.SimpleNamespace(dtype=dtype, shape=(2, 3, 64, width))
        self.attention = Attention()

    def get_input(self, index):
        assert index == 0
        return self.q


def fake(version, errors=(), engine=b"engine"):
    """Of what is called, only what that version has; `told` says what it was told."""
    trt = types.ModuleType("tensorrt")
    trt.__version__, trt.told = version, {}
    major, minor = (int(part) for part in version.split(".")[:2])
    flags = {"EXPLICIT_BATCH": 0} | ({"STRONGLY_TYPED": 1} if major == 10 else {})
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("Flag", flags)
    attention = {"ATTENTION_INPUT": 1} if (major, minor) >= (10, 14) else {}
    trt.LayerType = enum.Enum("LayerType", {"CAST": 0} | attention)
    trt.DataType = enum.Enum("DataType", "FLOAT HALF BF16")
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
    trt.IAttentionInputLayer = type("IAttentionInputLayer", (Layer,), {})

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING = 1, 0, 2

    class Network:
        def __init__(self):
            data = trt.DataType
            kinds = [(data.FLOAT, 64), (data.BF16, 64), (data.HALF, 8)] if attention else []
            self.layers = [Layer(trt, f"layer {i}", *kind) for i, kind in enumerate(kinds)]
            self.num_layers = len(self.layers)

        def get_layer(self, index):
            return self.layers[index]

    class Cache:
        def __init__(self, content):
            self.content = content

        def serialize(self):
            return b"timings"

    class Config:
        builder_optimization_level = None

        def set_memory_pool_limit(self, pool, size):
            trt.told["pool"] = pool, size

        def create_timing_cache(self, content):
            trt.told["cache"] = content
            return Cache(content)

        def set_timing_cache(self, cache, ignore_mismatch):
            assert not ignore_mismatch
            return cache.content != b"of another GPU"

    class Builder:
        def __init__(self, logger):
            self.logger = logger

        def create_network(self, flags):
            trt.told["flags"], trt.network = flags, Network()
            return trt.network

        def create_builder_config(self):
            trt.config = Config()
            return trt.config

        def build_serialized_network(self, network, config):
            if engine is None:
                self.logger.log(ILogger.ERROR, "no kernel\n for it")
                self.logger.log(ILogger.ERROR, "CUDA driver version is insufficient")
            return engine

    class Error:
        def __init__(self, name, operator, text):
            self.given = name, operator, text

        def node_name(self):
            return self.given[0]

        def node_operator(self):
            return self.given[1]

        def desc(self):
            return self.given[2]

        def code(self):
            return types.SimpleNamespace(name="UNSUPPORTED_NODE")

    class OnnxParser:
        num_errors = len(errors)

        def __init__(self, network, logger):
            assert isinstance(logger, ILogger)

        def parse_from_file(self, path):
            trt.told["path"] = path
            return not errors

        def get_error(self, index):
            return Error(*errors[index])

    trt.ILogger, trt.Builder, trt.OnnxParser = ILogger, Builder, OnnxParser
    return trt


@pytest.mark.parametrize("version", VERSIONS)
def test_networks_are_strongly_typed_in_every_version(version, tmp_path):
    trt = fake(version)
    cache = tmp_path / "timing.cache"
    built = builder.build(trt, tmp_path / "a.onnx", None, Limits(5 << 20, 3), cache)
    assert bytes(built.engine) == b"engine"
    assert trt.told["flags"] == (2 if version.startswith("10") else 0)  # 11 has no other networks
    assert trt.told["pool"] == (trt.MemoryPoolType.WORKSPACE, 5 << 20)
    assert trt.config.builder_optimization_level == 3
    assert trt.told["cache"] == b"" and cache.read_bytes() == b"timings"
    builder.build(trt, tmp_path / "a.onnx", None, Limits(), cache)
    assert trt.told["cache"] == b"timings"  # what one graph has taught serves the next


@pytest.mark.parametrize("version", VERSIONS)
def test_attention_without_a_kernel_may_be_taken_apart_and_no_other(version, tmp_path):
    trt = fake(version)
    built = builder.build(trt, tmp_path / "a.onnx", None, Limits())
    apart = [layer.attention.decomposable for layer in trt.network.layers]
    assert apart == ([] if version.startswith("10.13") else [True, False, True])  # float32, heads 8 wide
    names = ("layer 1",), ("layer 0", "layer 2")
    assert (built.whole_attention, built.decomposed_attention) == (names if apart else ((), ()))


def test_a_timing_cache_of_another_gpu_is_begun_again(tmp_path):
    trt, cache = fake(VERSIONS[0]), tmp_path / "timing.cache"
    cache.write_bytes(b"of another GPU")
    builder.build(trt, tmp_path / "a.onnx", None, Limits(), cache)
    assert trt.told["cache"] == b"" and cache.read_bytes() == b"timings"


def test_node_and_operator_are_named(tmp_path):
    trt = fake(VERSIONS[0], errors=[("a.b", "Einsum", "not\n here"), ("c", "Einsum", "")])
    with pytest.raises(
        ExportError,
        match=r"the graph a: node 'a\.b', operator Einsum: not here \(UNSUPPORTED_NODE\); and 1 more",
    ):
        builder.build(trt, tmp_path / "a.onnx", None, Limits())


def test_what_the_builder_says_is_told(tmp_path):
    with pytest.raises(ExportError, match=r"cannot build the graph a: no kernel for it$"):
        builder.build(fake(VERSIONS[1], engine=None), tmp_path / "a.onnx", None, Limits())


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("10.12.0.36", "TensorRT 10.12.0.36 is too old: 10.13 or newer is needed"),
        *((v, None) for v in VERSIONS),
    ],
)
def test_versions_that_are_too_old_are_refused(version, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", fake(version))
    if words is None:
        assert builder.library("tensorrt").__version__ == version
        return
    with pytest.raises(MissingDependency, match=words):
        builder.library("tensorrt")


def test_a_library_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        MissingDependency,
        match=r"tensorrt does not load.*: .*pip install '.\[tensorrt\]'",
    ):
        builder.library("tensorrt")
