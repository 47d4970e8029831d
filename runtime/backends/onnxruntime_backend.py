"""ONNX Runtime, on the CPU (the embedded default) or on CUDA."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import (
    BundleError,
    ConceptMasterError,
    InputError,
    OutOfMemory,
    free_memory,
    is_out_of_memory,
)
from ..bundle_format.manifest import REPAIR
from ..bundle_format.schema import TensorSpec
from ..cpus import usable
from .graph_backend import GraphBackend, in_the_way
from .onnxruntime_module import onnxruntime, session_options

if TYPE_CHECKING:
    from pathlib import Path

    from ..bundle_format.find import Bundle

log = logging.getLogger(__name__)

MEMORY = 3
"""Bytes that a loaded graph takes for each of its files, estimated: weights stored in 16 bits become float32,
and a session keeps what its largest call needs."""
BESIDE = "session.model_external_initializers_file_folder_path"
"""Where the weights are of a graph that is not read from a file."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


class OnnxRuntimeBackend(GraphBackend):
    """Runs graphs with ONNX Runtime; arrays are OrtValues on `device`.

    A graph's session is made when it is first needed and its real signature is held to the manifest's. Of two
    experts one is let go before the other is loaded where both do not fit, on CUDA always. May be used from
    several threads at once; they then share the CPU threads.

    Raises: InputError when `device` is not there: there is no silent fallback to another one.
    """

    def __init__(self, bundle: Bundle, device: str, threads: int | None) -> None:
        available = onnxruntime.get_available_providers()
        if PROVIDERS[device] not in available:
            raise InputError(
                f"device {device!r} is not there: this onnxruntime has {', '.join(available)}; "
                "for CUDA: pip install onnxruntime-gpu instead of onnxruntime"
            )
        self._bundle = bundle
        self._device = device
        self._threads = threads = usable() if threads is None else threads
        self._options = self._session_options()
        self._quiet = onnxruntime.RunOptions()
        self._quiet.log_severity_level = 4
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()
        log.info("onnxruntime %s on %s, threads: %d", onnxruntime.__version__, device, threads)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs `graph`. inputs: NumPy arrays or OrtValues, exact dtypes and shapes. Returns OrtValues by
        name.

        Raises: KeyError for a missing input, ValueError for a wrong dtype or shape, BundleError for a graph
            that does not run on what it is given, OutOfMemory.
        """
        session, signature = self._session(graph), self._bundle.manifest.graphs[graph]
        binding = session.io_binding()
        for spec in signature.inputs:
            binding.bind_ortvalue_input(spec.name, self._to_device(inputs[spec.name], graph, spec))
        for spec in signature.outputs:
            binding.bind_output(spec.name, self._device)
        try:
            session.run_with_iobinding(binding, self._quiet)
        except Exception as error:
            raise _failed(graph, f"the graph {graph} does not run", error) from error
        return {
            spec.name: value for spec, value in zip(signature.outputs, binding.get_outputs(), strict=True)
        }

    def to_host(self, array: Any) -> np.ndarray:
        """An OrtValue (or NumPy array) as NumPy."""
        return array if isinstance(array, np.ndarray) else array.numpy()

    def close(self) -> None:
        """Lets the sessions go."""
        with self._lock:
            self._sessions.clear()

    def _to_device(self, array: Any, graph: str, spec: TensorSpec) -> Any:
        if not isinstance(array, np.ndarray):
            return array
        spec.check(graph, array)
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device)

    def _session(self, graph: str) -> Any:
        """Raises BundleError, OutOfMemory, InputError when CUDA does not start."""
        with self._lock:
            for other in self._in_the_way(graph):
                del self._sessions[other]
            if graph not in self._sessions:
                self._sessions[graph] = self._open(graph)
            return self._sessions[graph]

    _make_ready = _session

    def _in_the_way(self, graph: str) -> set[str]:
        return in_the_way(graph, self._sessions, self._needs, self._free)

    def _free(self) -> int | None:
        return free_memory() if self._device == "cpu" else None  # of a GPU ONNX Runtime does not tell

    def _needs(self, graph: str) -> int:
        files = self._bundle.manifest.graphs[graph].files()
        return MEMORY * sum((self._bundle.folder / file.file).stat().st_size for file in files)

    def _open(self, graph: str) -> Any:
        signature = self._bundle.manifest.graphs[graph]
        with self._bundle.reading(graph) as path:
            model, options = self._model(path, graph)
            try:
                session = onnxruntime.InferenceSession(
                    model, options, providers=[PROVIDERS[self._device]], enable_fallback=False
                )
            except Exception as error:  # onnxruntime's own exception types are not public
                raise _failed(graph, f"{str(path)!r} does not load", error) from error
        if PROVIDERS[self._device] not in session.get_providers():
            raise InputError(f"device {self._device!r} does not start; see onnxruntime's message above")
        for side, specs, found in (
            ("inputs", signature.inputs, session.get_inputs()),
            ("outputs", signature.outputs, session.get_outputs()),
        ):
            real = [(t.name, DTYPES.get(t.type, t.type), tuple(t.shape)) for t in found]
            wanted = [(spec.name, spec.dtype, spec.shape) for spec in specs]
            if real != wanted:
                raise BundleError(
                    f"bad bundle: the {side} of {str(path)!r} are not those in the manifest: "
                    f"{_difference(real, wanted)}; {REPAIR}"
                )
        return session

    def _session_options(self) -> Any:
        options = session_options(self._threads)
        if (
            self._device == "cpu"
        ):  # CUDA tells only there why it does not start; else what goes wrong is raised
            options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        return options

    def _model(self, path: Path, graph: str) -> tuple[str | bytes, Any]:
        """What a session is made of, and its options: a file, or what deltas make of it."""
        custom = self._bundle.custom
        if custom is None or not custom.deltas:
            return str(path), self._options
        from .changed_graph import changed, changes

        if not changes(graph):
            return str(path), self._options
        options = self._session_options()
        options.add_session_config_entry(BESIDE, str(path.parent))
        return changed(path, graph, custom), options


def _difference(real: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]]) -> str:
    only = [f"{name} {dtype} {list(shape)} in the {place}" for place, here, there in
            (("graph", real, wanted), ("manifest", wanted, real))
            for name, dtype, shape in here if (name, dtype, shape) not in there]  # fmt: skip
    return ", ".join(only) or "another order"


def _failed(graph: str, what: str, error: Exception) -> ConceptMasterError:
    """What to raise for an error of onnxruntime's."""
    reason = " ".join(str(error).split())
    if is_out_of_memory(error):
        return OutOfMemory(f"out of memory in the graph {graph} ({reason:.200})")
    return BundleError(f"bad bundle: {what}: {reason:.300}; {REPAIR}")
