"""TensorRT, or TensorRT for RTX: a bundle's engines, with cuda-python for memory. No torch.

The only file that imports them. Every buffer is allocated once and used again: a host array is copied into
its graph's own input buffer, a graph writes into buffers that nobody holds any more, and what it wrote is
bound as the next graph's input where it lies. Everything is in the order of one stream. From its second call
with the same buffers on, a graph is replayed as a CUDA graph.
"""

from __future__ import annotations

import importlib
import logging
import math
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BundleError, InputError, OutOfMemory, how_to_install, not_loaded
from ..bundle_format import tensorrt_engines as stored
from ..bundle_format.schema import TensorSpec
from .graph_backend import GraphBackend, in_the_way

if TYPE_CHECKING:
    from ..bundle_format.find import Bundle

log = logging.getLogger(__name__)

DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
NO_MEMORY = 2  # cudaErrorMemoryAllocation
CUDA_GRAPHS = 16  # kept; more would mean that the buffers never come round


class DeviceArray:
    """Where a result lies on the GPU; its buffer is used again once nobody holds this any more."""

    def __init__(self, address: int, spec: TensorSpec) -> None:
        self.address = address
        self.spec = spec


class TensorRTBackend(GraphBackend):
    """Runs a bundle's engines for the GPU that is there; arrays are `DeviceArray`s.

    Args: flavor: "tensorrt" or "rtx"; precision: of the engines, None for the only ones that are there;
        cuda_graphs: replay instead of launching again. May be used from several threads, one after the other.
    Raises: MissingDependency; InputError without a GPU, OutOfMemory; BundleError when the
        engines are missing, of another GPU, version or bundle, or damaged, naming the command that builds
        them.
    """

    def __init__(
        self, bundle: Bundle, flavor: str = "tensorrt", precision: str | None = None, cuda_graphs: bool = True
    ) -> None:
        if precision is not None and precision not in stored.PRECISIONS:
            raise InputError(f"unknown precision {precision!r}: choose one of {', '.join(stored.PRECISIONS)}")
        self._trt = library(flavor)
        self._cuda = _cuda(flavor)
        self._bundle = bundle
        version = stored.short_version(self._trt.__version__)
        capability = gpu_capability(flavor)
        self._files, self._engines = stored.choose(bundle, flavor, version, capability, precision)
        self._rebuild = stored.rebuild_command(bundle.folder, self._engines)
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._stream = self._call("cudaStreamCreate")
        self._contexts: dict[str, tuple[Any, Any]] = {}  # graph -> engine, context
        self._inputs: dict[tuple[str, str], int] = {}  # graph, input -> its buffer for host arrays
        self._free: dict[int, list[int]] = {}  # bytes -> buffers that nobody holds
        self._buffers: list[int] = []  # all of them
        self._seen: set[tuple[Any, ...]] = set()
        self._replays: dict[tuple[Any, ...], Any] | None = {} if cuda_graphs else None
        self._lock = threading.RLock()
        log.info("%s %s on sm_%d, engines in %s", flavor, version, capability, self._files.folder)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs `graph`. inputs: NumPy arrays or DeviceArrays, exact dtypes and shapes. Returns DeviceArrays
        by name, before they are computed.

        Raises: KeyError for a missing input, ValueError for a wrong dtype or shape.
        """
        signature = self._bundle.manifest.graphs[graph]
        with self._lock:
            context = self._context(graph)
            addresses = {spec.name: self._bind(graph, spec, inputs[spec.name]) for spec in signature.inputs}
            results = {spec.name: self._result(spec) for spec in signature.outputs}
            addresses |= {name: result.address for name, result in results.items()}
            self._launch(graph, context, addresses)
        return results

    def to_host(self, array: Any) -> np.ndarray:
        """A DeviceArray (or NumPy array) as NumPy; waits until it is computed."""
        if isinstance(array, np.ndarray):
            return array
        host = np.empty(array.spec.shape, array.spec.dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        with self._lock:
            self._call("cudaMemcpyAsync", host.ctypes.data, array.address, host.nbytes, kind, self._stream)
            self._call("cudaStreamSynchronize", self._stream)
        return host

    def close(self) -> None:
        """Frees the engines and every buffer: no DeviceArray may be used after it."""
        with self._lock:
            self._call("cudaStreamSynchronize", self._stream)
            for replay in (self._replays or {}).values():
                self._call("cudaGraphExecDestroy", replay)
            for address in self._buffers:
                self._call("cudaFree", address)
            for held in (self._replays or {}, self._contexts, self._inputs, self._free, self._seen):
                held.clear()
            self._buffers.clear()

    def _launch(self, graph: str, context: Any, addresses: dict[str, int]) -> None:
        key = (graph, *addresses.values())
        if self._replays is not None and key in self._replays:
            self._call("cudaGraphLaunch", self._replays[key], self._stream)
            return
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise BundleError(f"the engine of {graph} has no tensor {name!r}: {self._rebuild}")
        if self._replays is None or key not in self._seen or len(self._replays) >= CUDA_GRAPHS:
            self._seen.add(key)  # the first call may allocate, which no CUDA graph may hold
            self._enqueue(graph, context)
            return
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        self._enqueue(graph, context)
        captured = self._call("cudaStreamEndCapture", self._stream)
        self._replays[key] = self._call("cudaGraphInstantiate", captured, 0)
        self._call("cudaGraphLaunch", self._replays[key], self._stream)

    def _enqueue(self, graph: str, context: Any) -> None:
        if not context.execute_async_v3(int(self._stream)):
            raise BundleError(f"the engine of {graph} does not run: {self._rebuild}")

    def _bind(self, graph: str, spec: TensorSpec, array: Any) -> int:
        """The address of an input; of a host array, after copying it there."""
        spec.check(graph, array.spec if isinstance(array, DeviceArray) else array)
        if isinstance(array, DeviceArray):
            return array.address
        key = (graph, spec.name)
        if key not in self._inputs:
            self._inputs[key] = self._allocate(_bytes(spec))
        host = np.ascontiguousarray(array)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", self._inputs[key], host.ctypes.data, host.nbytes, kind, self._stream)
        return self._inputs[key]

    def _result(self, spec: TensorSpec) -> DeviceArray:
        size = _bytes(spec)
        waiting = self._free.setdefault(size, [])
        result = DeviceArray(waiting.pop() if waiting else self._allocate(size), spec)
        weakref.finalize(result, waiting.append, result.address)
        return result

    def _context(self, graph: str) -> Any:
        """Raises BundleError, OutOfMemory."""
        with self._lock:
            self._let_go(self._in_the_way(graph))
            if graph not in self._contexts:
                self._contexts[graph] = self._open(graph)
            return self._contexts[graph][1]

    _make_ready = _context

    def _in_the_way(self, graph: str) -> set[str]:
        return in_the_way(graph, self._contexts, self._needs, lambda: self._call("cudaMemGetInfo")[0])

    def _needs(self, graph: str) -> int:
        """The engine, and what a call of it takes: as much as one of the other expert's, whose shapes are
        the same."""
        file = self._files.folder / self._engines.engines[graph].file
        alike = max((self._contexts[other][0].device_memory_size_v2 for other in self._contexts), default=0)
        return file.stat().st_size + alike

    def _let_go(self, graphs: set[str]) -> None:
        """Frees the engines of `graphs` and their CUDA graphs; their buffers stay, for others of their
        size."""
        if not graphs:
            return
        self._call("cudaStreamSynchronize", self._stream)
        replays = self._replays if self._replays is not None else {}
        for key in [key for key in replays if key[0] in graphs]:
            self._call("cudaGraphExecDestroy", replays.pop(key))
        self._seen = {key for key in self._seen if key[0] not in graphs}
        for graph in graphs:
            del self._contexts[graph]

    def _open(self, graph: str) -> tuple[Any, Any]:
        with self._files.reading([self._engines.engines[graph].hashed]) as path:
            self._require_memory(path.stat().st_size, graph)
            data = path.read_bytes()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BundleError(f"TensorRT does not load the engine of {graph}: {self._rebuild}")
        self._check_signature(graph, engine)
        self._require_memory(engine.device_memory_size_v2, graph)
        context = engine.create_execution_context()
        if context is None:
            raise BundleError(f"TensorRT makes no context for {graph}: {self._rebuild}")
        return engine, context

    def _check_signature(self, graph: str, engine: Any) -> None:
        signature, sides = self._bundle.manifest.graphs[graph], self._trt.TensorIOMode
        real: dict[Any, list[tuple[Any, ...]]] = {sides.INPUT: [], sides.OUTPUT: []}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_dtype(name).name
            shape = tuple(engine.get_tensor_shape(name))
            real[engine.get_tensor_mode(name)].append((name, DTYPES.get(kind, kind), shape))
        for side, specs in ((sides.INPUT, signature.inputs), (sides.OUTPUT, signature.outputs)):
            if sorted(real[side]) != sorted((spec.name, spec.dtype, spec.shape) for spec in specs):
                raise BundleError(
                    f"the engine of {graph} has another signature than its graph: {self._rebuild}"
                )

    def _require_memory(self, size: int, graph: str) -> None:
        free, _ = self._call("cudaMemGetInfo")
        if size > free:
            raise OutOfMemory(
                f"the engine of {graph} needs {_amount(size)} more of GPU memory, {_amount(free)} are free: "
                "end other programs there, or use a larger GPU"
            )

    def _allocate(self, size: int) -> int:
        self._require_memory(size, "this bundle")
        self._buffers.append(int(self._call("cudaMalloc", size)))
        return self._buffers[-1]

    def _call(self, name: str, *arguments: Any) -> Any:
        return _call(self._cuda, name, *arguments)


def library(flavor: str) -> Any:
    """TensorRT's module, or TensorRT for RTX's. Raises MissingDependency, one line, when it does not load."""
    return _import(stored.MODULES[flavor], flavor)


def gpu_capability(flavor: str = "tensorrt") -> int:
    """The compute capability of the first GPU, 90 for sm_90. Raises InputError without one, MissingDependency
    without cuda-python."""
    cuda = _cuda(flavor)
    kinds = cuda.cudaDeviceAttr
    sides = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
    try:
        major, minor = (int(_call(cuda, "cudaDeviceGetAttribute", side, 0)) for side in sides)
    except InputError as error:
        raise InputError(f"there is no GPU, which engines need ({error})") from None
    return 10 * major + minor


def _cuda(flavor: str) -> Any:
    return _import("cuda.bindings.runtime", flavor)


def _call(cuda: Any, name: str, *arguments: Any) -> Any:
    """Calls a function of CUDA's runtime; its results but the status. Raises InputError, OutOfMemory."""
    status, *results = getattr(cuda, name)(*arguments)
    if int(status):
        kind = OutOfMemory if int(status) == NO_MEMORY else InputError
        raise kind(f"CUDA: {name} says {getattr(status, 'name', status)}")
    return results[0] if len(results) == 1 else tuple(results)


def _import(module: str, flavor: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a wheel that is only a stub raises what it likes
        raise not_loaded(module, how_to_install(stored.EXTRAS[flavor]), error) from error


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _amount(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
