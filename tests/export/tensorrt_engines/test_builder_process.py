"""The builder in its own process, with libraries made up for it: one that crashes, one that answers."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("onnxscript")

from conceptmaster.cli import main  # noqa: E402
from conceptmaster.errors import ExportError, MissingDependency  # noqa: E402
from conceptmaster.export.tensorrt_engines.builder import Limits  # noqa: E402
from conceptmaster.export.tensorrt_engines.builder_process import BuilderProcess, EngineSummary  # noqa: E402

LIBRARY = """
import enum, os, signal, sys
__version__ = "1.7.1.116"
ComputeCapability = enum.IntEnum("ComputeCapability", "SM89")
NetworkDefinitionCreationFlag = enum.IntEnum("Flag", {"EXPLICIT_BATCH": 0})
LayerType = enum.Enum("LayerType", "CAST")
DataType = enum.Enum("DataType", "FLOAT")

class ILogger:
    ERROR, INTERNAL_ERROR = 1, 0

class Network:
    num_layers = 3
    def get_layer(self, index):
        class layer:
            type = LayerType.CAST
        return layer

class Config:
    def set_compute_capability(self, capability, index): pass

class OnnxParser:
    num_errors = 0
    def __init__(self, network, log): pass
    def parse_from_file(self, path):
        self.path = OnnxParser.path = path
        return "refused" not in path

class Builder:
    def __init__(self, log): pass
    def create_network(self, flags): return Network()
    def create_builder_config(self): return Config()
    def build_serialized_network(self, network, config):
        print("what a library prints is no answer", flush=True)
        CRASH
        return b"engine of " + OnnxParser.path.encode()
"""
NO_CRASH = "print(OnnxParser.path, file=sys.stderr)"
CRASH = "os.kill(os.getpid(), signal.SIGSEGV)"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """`library(code)`: a made-up tensorrt_rtx, whose builder runs the code."""

    def write(crash):
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "tensorrt_rtx.py").write_text(LIBRARY.replace("CRASH", crash))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)

    yield write
    sys.modules.pop("tensorrt_rtx", None)


def build(process, tmp_path, name):
    graph, engine = tmp_path / f".{name}.onnx", tmp_path / f"{name}.engine"
    return process.build(graph, engine, "bf16", 89, Limits(), None), engine


def test_one_process_builds_one_graph_after_the_other(library, tmp_path):
    library(NO_CRASH)
    with BuilderProcess("rtx", with_plugin=False) as process:
        for name in ("condition", "denoise"):
            found, engine = build(process, tmp_path, name)
            assert found == EngineSummary(name, engine.stat().st_size, 3, 0, 0)
            assert engine.read_bytes().endswith(f".{name}.onnx".encode())
        with pytest.raises(ExportError, match="TensorRT does not take the graph refused"):
            build(process, tmp_path, "refused")
        assert build(process, tmp_path, "dam")[0].graph == "dam"  # the process lives on


@pytest.mark.parametrize(
    ("crash", "words"),
    [
        (CRASH, r"the builder of tensorrt_rtx crashed \(SIGSEGV\) while it built the graph denoise in bf16 "),
        (CRASH.replace("SEGV", "KILL"), r"\(SIGKILL\), for which a lack of memory is the usual reason"),
        ("raise OSError('no space')", r"ended with exit code 1 while .*\(OSError: no space\): try another"),
    ],
)
def test_a_crash_is_one_line(library, tmp_path, crash, words):
    library(crash)
    with BuilderProcess("rtx", with_plugin=False) as process:
        for _ in range(2):  # once it is gone, it is gone
            with pytest.raises(ExportError, match=words) as error:
                build(process, tmp_path, "denoise")
    assert "\n" not in str(error.value) and "--precision" in str(error.value)


def test_a_library_that_does_not_load_says_why(library, tmp_path):
    library(NO_CRASH)
    (tmp_path / "site" / "tensorrt_rtx.py").write_text("raise RuntimeError('a stub')")
    with (
        BuilderProcess("rtx", with_plugin=False) as process,
        pytest.raises(MissingDependency, match="tensorrt_rtx is installed but does not load: a stub"),
    ):
        build(process, tmp_path, "denoise")


def test_the_command_ends_in_one_line_and_leaves_no_graph_behind(library, bundle, tmp_path, capfd):
    import shutil

    library(CRASH)
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    assert main(["build", str(folder), "--flavor", "rtx", "--target", "sm_89"]) == 1
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1 and "crashed (SIGSEGV)" in error
    assert [path.name for path in folder.glob("engines/*/.*")] == []
    assert not list(folder.glob("engines/*/engines.json"))
