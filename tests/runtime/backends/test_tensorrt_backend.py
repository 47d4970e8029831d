"""The TensorRT backend against fakes of tensorrt and cuda-python: no engine runs here.

The fakes hold to the two libraries' interfaces. Device memory is host memory, and a fake engine is the ONNX
graph itself, which ONNX Runtime computes when the engine would: so what is tested is all that lies around an
engine.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import inspect
import shutil
import sys
import types

import numpy as np
import onnxruntime
import pytest

from conceptmaster import Pipeline
from conceptmaster.errors import BundleError, InputError, MissingDependency, OutOfMemory
from conceptmaster.hashed import sha256_file
from conceptmaster.runtime.backends import open_backend
from conceptmaster.runtime.bundle_format import tensorrt_engines as stored
from conceptmaster.runtime.bundle_format.find import SHIPPED, Bundle
from conceptmaster.runtime.bundle_format.hashed_file import HashedFile
from conceptmaster.runtime.bundle_format.manifest import load

VERSION, CAPABILITY = "11.4.0.106", 90


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100


class Cuda(types.ModuleType):
    """cuda.bindings.runtime: each function gives a status and its results."""

    def __init__(self):
        super().__init__("cuda.bindings.runtime")
        self.memory, self.calls, self.recorded, self.free = {}, [], None, 1 << 34
        self.cudaDeviceAttr = enum.Enum(
            "A", "cudaDevAttrComputeCapabilityMajor cudaDevAttrComputeCapabilityMinor"
        )
        self.cudaMemcpyKind = enum.Enum("K", "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost")
        self.cudaStreamCaptureMode = enum.Enum("M", "cudaStreamCaptureModeThreadLocal")

    def cudaDeviceGetAttribute(self, kind, device):
        return Status.cudaSuccess, CAPABILITY // 10 if kind.name.endswith("Major") else CAPABILITY % 10

    def cudaStreamCreate(self):
        return Status.cudaSuccess, 7

    def cudaMalloc(self, size):
        block = np.full(size, 0xAB, np.uint8)
        self.memory[block.ctypes.data] = block
        self.calls.append("malloc")
        return Status.cudaSuccess, block.ctypes.data

    def cudaFree(self, address):
        del self.memory[address]
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph):
        self.calls.append("destroy")
        return (Status.cudaSuccess,)

    def cudaMemGetInfo(self):
        return Status.cudaSuccess, self.free, 1 << 35

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        assert stream == 7 and self.recorded is None
        ctypes.memmove(target, source, size)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.recorded = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        found, self.recorded = self.recorded, None
        return Status.cudaSuccess, found

    def cudaGraphInstantiate(self, graph, flags):
        return Status.cudaSuccess, graph

    def cudaGraphLaunch(self, graph, stream):
        self.calls.append("replay")
        for job in graph:
            job()
        return (Status.cudaSuccess,)


def fake_tensorrt(cuda):
    trt = types.ModuleType("tensorrt")
    trt.__version__ = VERSION
    trt.TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
    trt.DataType = enum.Enum("DataType", "FLOAT HALF INT64 INT32 BOOL")
    kinds = {"tensor(float)": "FLOAT", "tensor(bool)": "BOOL", "tensor(int64)": "INT64"}

    class Logger:
        ERROR = 1

        def __init__(self, severity):
            self.severity = severity

    class Context:
        def __init__(self, engine):
            self.engine, self.addresses = engine, {}

        def set_tensor_address(self, name, address):
            self.addresses[name] = address
            return name in self.engine.tensors

        def execute_async_v3(self, stream_handle):
            assert stream_handle == 7
            addresses = dict(self.addresses)
            cuda.calls.append("enqueue")
            if cuda.recorded is not None:  # while a CUDA graph is captured nothing runs
                cuda.recorded.append(lambda: self.compute(addresses))
            else:
                self.compute(addresses)
            return True

        def compute(self, addresses):
            def view(tensor):
                dtype = {"tensor(float)": np.float32, "tensor(bool)": bool, "tensor(int64)": np.int64}[
                    tensor.type
                ]
                size = int(np.prod(tensor.shape)) * np.dtype(dtype).itemsize
                block = cuda.memory[addresses[tensor.name]]
                assert block.size == size
                return block.view(dtype).reshape(tensor.shape)

            session = self.engine.session
            outputs = session.run(None, {t.name: view(t) for t in session.get_inputs()})
            for tensor, value in zip(session.get_outputs(), outputs, strict=True):
                view(tensor)[...] = value

    class Engine:
        device_memory_size_v2 = 1024

        def __init__(self, data):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
            self.tensors = {t.name: (t, trt.TensorIOMode.INPUT) for t in inputs}
            self.tensors |= {t.name: (t, trt.TensorIOMode.OUTPUT) for t in outputs}
            self.num_io_tensors = len(self.tensors)

        def get_tensor_name(self, index):
            return list(self.tensors)[index]

        def get_tensor_dtype(self, name):
            return trt.DataType[kinds[self.tensors[name][0].type]]

        def get_tensor_shape(self, name):
            return self.tensors[name][0].shape

        def get_tensor_mode(self, name):
            return self.tensors[name][1]

        def create_execution_context(self):
            return Context(self)

    class Runtime:
        def __init__(self, logger):
            assert isinstance(logger, Logger)

        def deserialize_cuda_engine(self, data):
            return None if data == b"broken" else Engine(data)

    trt.Logger, trt.Runtime = Logger, Runtime
    return trt


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(cuda))
    return cuda


@pytest.fixture
def folder(tmp_path):
    """A bundle with engines that are its graphs."""
    folder = tmp_path / "bundle"
    shutil.copytree(SHIPPED / "sprites", folder)
    made = stored.Engines(stored.FORMAT, "tensorrt", "11.4.0", CAPABILITY, "fp32", 0, {})
    write_engines(folder, made)
    return folder


def write_engines(folder, engines, contents=None):
    place = folder / stored.FOLDER / engines.folder_name
    place.mkdir(parents=True)
    for name, graph in load(folder).graphs.items():
        path = place / f"{name}.engine"
        path.write_bytes(contents or (folder / graph.file).read_bytes())
        engines.engines[name] = stored.EngineFile(path.name, sha256_file(path), stored.graph_sha256(graph))
    stored.save(engines, place)
    return place


def test_a_video_is_onnx_runtimes(folder, cuda):
    expected = Pipeline.from_bundle(folder, threads=1)("a ball rolls left", seed=3, steps=5).frames
    pipeline = Pipeline.from_bundle(folder, device="tensorrt")
    assert (pipeline("a ball rolls left", seed=3, steps=5).frames == expected).all()
    assert "replay" in cuda.calls
    blocks = cuda.calls.count("malloc")
    for _ in range(4):
        enqueued = cuda.calls.count("enqueue")
        assert (pipeline("a ball rolls left", seed=3, steps=5).frames == expected).all()
    assert cuda.calls.count("malloc") == blocks  # all memory is there from the first video on
    assert cuda.calls.count("enqueue") == enqueued  # and in the end everything is replayed
    assert cuda.memory
    pipeline.close()
    assert not cuda.memory and "destroy" in cuda.calls


@pytest.mark.parametrize("room", [False, True])
def test_two_experts_are_there_at_a_time_where_memory_holds_them(make_experts, bundle, cuda, room):
    folder = make_experts()
    made = stored.Engines(stored.FORMAT, "tensorrt", "11.4.0", CAPABILITY, "fp32", 0, {})
    place = write_engines(folder, made)
    if not room:  # for the second's engines, and for a call of one, not of both
        second = [place / f"{name}_2.engine" for name in ("condition", "denoise")]
        cuda.free = sum(file.stat().st_size for file in second) + 1500
    expected = Pipeline.from_bundle(bundle, threads=1)("a red ball", steps=6).frames
    with Pipeline.from_bundle(folder, device="tensorrt") as pipeline:
        for _ in range(5):
            assert (pipeline("a red ball", steps=6).frames == expected).all()
        contexts = pipeline.backend._contexts
        assert ("denoise" in contexts) == room and "denoise_2" in contexts
        assert ("destroy" in cuda.calls) != room and "replay" in cuda.calls


def test_results_that_are_held_are_not_written_over(folder, cuda):
    backend = open_backend(Bundle.open(folder), "tensorrt", None)
    shapes = load(folder).graphs["decode_first"].input("latents").shape
    latents = [np.random.default_rng(i).standard_normal(shapes).astype(np.float32) for i in range(4)]
    held = [backend.run("decode_first", {"latents": each})["frames"] for each in latents]
    found = [backend.to_host(array) for array in held]
    assert len({array.address for array in held}) == 4
    again = [backend.to_host(backend.run("decode_first", {"latents": each})["frames"]) for each in latents]
    assert all((a == b).all() for a, b in zip(found, again, strict=True))


def test_wrong_arrays_are_told(folder, cuda):
    backend = open_backend(Bundle.open(folder), "tensorrt", None)
    with pytest.raises(ValueError, match="decode_first: 'latents' must be float32"):
        backend.run("decode_first", {"latents": np.zeros((1, 2), np.float32)})
    with pytest.raises(KeyError):
        backend.run("decode_first", {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"capability": 89}, "has no engines for sm_90 and tensorrt 11.4.0"),
        ({"version": "10.13.3"}, "has no engines for sm_90"),
        ({"plugin_abi": 99}, "plugin of ABI 99"),
    ],
)
def test_engines_for_something_else_name_the_command(tmp_path, cuda, change, words):
    folder = tmp_path / "bundle"
    shutil.copytree(SHIPPED / "sprites", folder)
    made = {"version": "11.4.0", "capability": CAPABILITY, "precision": "bf16", "plugin_abi": 0} | change
    write_engines(folder, stored.Engines(format=stored.FORMAT, flavor="tensorrt", engines={}, **made))
    with pytest.raises(BundleError, match=words) as error:
        open_backend(Bundle.open(folder), "tensorrt", None)
    assert f"conceptmaster build {folder} --target sm_90 --precision bf16" in str(error.value)


def test_precision_chooses_between_engines(tmp_path, cuda, capsys):
    from conceptmaster.cli import main

    folder = tmp_path / "bundle"
    shutil.copytree(SHIPPED / "sprites", folder)
    for precision in ("bf16", "fp8"):
        made = stored.Engines(stored.FORMAT, "tensorrt", "11.4.0", CAPABILITY, precision, 0, {})
        write_engines(folder, made)
    with pytest.raises(InputError, match="has engines in bf16, fp8: choose one with --precision"):
        Pipeline.from_bundle(folder, device="tensorrt")
    pipeline = Pipeline.from_bundle(folder, device="tensorrt", precision="fp8")
    assert pipeline.backend._files.folder.name == "sm90-tensorrt11.4.0-fp8"
    with pytest.raises(BundleError, match="no engines for sm_90 and tensorrt 11.4.0 in fp16"):
        Pipeline.from_bundle(folder, device="tensorrt", precision="fp16")
    output = tmp_path / "a.npy"
    request = ["generate", "--prompt", "a ball", "--steps", "1", "--output", str(output), "--quiet"]
    engines = ["--bundle", str(folder), "--device", "tensorrt"]
    assert main([*request, *engines]) == 2 and "--precision" in capsys.readouterr().err
    assert main([*request, *engines, "--precision", "fp8"]) == 0 and output.is_file()
    assert main([*request, *engines, "--precision", "int4"]) == 2
    assert "unknown precision 'int4': choose one of fp32" in capsys.readouterr().err
    assert main([*request, "--precision", "bf16"]) == 2
    assert "it goes with the device tensorrt or rtx" in capsys.readouterr().err


def test_engines_of_other_weights_beside_the_same_graph_are_refused(folder, cuda):
    bundle = Bundle.open(folder)
    graph = bundle.manifest.graphs["denoise"]
    other = [dataclasses.replace(graph, external=(HashedFile("denoise.onnx.data", x * 64),)) for x in "ab"]
    first, second, plain = (stored.graph_sha256(g) for g in (*other, graph))
    assert len({first, second, plain}) == 3 and plain == graph.sha256
    with pytest.raises(
        BundleError, match="denoise.engine' was built from another denoise than this bundle's"
    ):
        graphs = bundle.manifest.graphs | {"denoise": other[0]}
        changed = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, graphs=graphs))
        stored.choose(changed, "tensorrt", "11.4.0", CAPABILITY)


def test_a_tampered_engine_is_refused(folder, cuda):
    (path,) = folder.glob("engines/*/denoise.engine")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(
        BundleError, match=r"denoise.engine' has SHA-256 \w+, expected \w+: conceptmaster build"
    ):
        open_backend(Bundle.open(folder), "tensorrt", None)
    (index,) = folder.glob("engines/*/engines.json")
    index.write_text(index.read_text().replace("fp32", "bf16"))
    with pytest.raises(BundleError, match="differs from its own checksum"):
        open_backend(Bundle.open(folder), "tensorrt", None)


def test_an_engine_that_does_not_load_is_told(tmp_path, cuda):
    folder = tmp_path / "bundle"
    shutil.copytree(SHIPPED / "sprites", folder)
    made = stored.Engines(stored.FORMAT, "tensorrt", "11.4.0", CAPABILITY, "fp32", 0, {})
    write_engines(folder, made, b"broken")
    backend = open_backend(Bundle.open(folder), "tensorrt", None)
    with pytest.raises(BundleError, match="does not load the engine of dam"):
        backend.load(["dam"])


def test_too_little_memory_says_how_much(folder, cuda):
    backend = open_backend(Bundle.open(folder), "tensorrt", None)
    cuda.free = 3 << 19
    size = (folder / "denoise.onnx").stat().st_size / 2**20
    with pytest.raises(
        OutOfMemory, match=rf"denoise needs {size:.1f} MiB more of GPU memory, 1\.5 MiB are free"
    ):
        backend.load(["denoise"])


def test_without_a_gpu_it_is_told(folder, cuda, monkeypatch):
    monkeypatch.setattr(cuda, "cudaDeviceGetAttribute", lambda *_: (Status.cudaErrorNoDevice, None))
    with pytest.raises(InputError, match="there is no GPU, which engines need .*cudaErrorNoDevice"):
        open_backend(Bundle.open(folder), "tensorrt", None)


def test_without_the_libraries_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match=r"pip install '.\[tensorrt\]'"):
        open_backend(Bundle.open(folder), "tensorrt", None)


def test_the_real_bindings_have_what_is_called():
    """On the signatures, where the package is installed; it makes nothing and runs nothing."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    for owner, names in {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: [
            *("num_io_tensors", "get_tensor_name", "get_tensor_dtype", "get_tensor_shape", "get_tensor_mode"),
            *("device_memory_size_v2", "create_execution_context"),
        ],
        trt.IExecutionContext: ["set_tensor_address", "execute_async_v3"],
        trt.TensorIOMode: ["INPUT", "OUTPUT"],
        trt.DataType: ["FLOAT", "HALF", "INT64", "INT32", "BOOL"],
    }.items():
        assert [name for name in names if not hasattr(owner, name)] == []
    assert "stream_handle" in trt.IExecutionContext.execute_async_v3.__doc__


def test_the_real_cuda_bindings_have_what_is_called():
    """The fake's functions take what the real ones take, where the package is installed."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    for name, function in vars(Cuda).items():
        if name.startswith("cuda"):
            own, real = (inspect.signature(f).parameters for f in (function, getattr(runtime, name)))
            assert len(own) == len(real) + 1, name  # self
    for name, kind in vars(Cuda()).items():
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            assert [m.name for m in kind if not hasattr(getattr(runtime, name), m.name)] == []
    status, *_ = runtime.cudaGetDeviceCount()
    assert int(status) == status.value and status.name.startswith("cuda")
