"""ONNX Runtime, on the CPU (the embedded default) or on CUDA."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BundleError, InputError
from ..bundle_format.manifest import REPAIR
from ..bundle_format.schema import TensorSpec
from ..cpus import usable
from .onnxruntime_module import onnxruntime, session_options

if TYPE_CHECKING:
    from ..bundle_format.find import Bundle

log = logging.getLogger(__name__)

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


class OnnxRuntimeBackend:
    """Runs graphs with ONNX Runtime; arrays are OrtValues on `device`.

    A graph's session is made when it is first needed and its real signature is held to the manifest's. May be
    used from several threads at once; they then share the CPU threads.

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
        threads = usable() if threads is None else threads
        self._options = session_options(threads)
        self._options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()
        log.info("onnxruntime %s on %s, threads: %d", onnxruntime.__version__, device, threads)

    def load(self, graphs: Iterable[str]) -> None:
        """Makes the sessions of `graphs`. Raises BundleError, InputError when CUDA does not start."""
        for graph in graphs:
            self._session(graph)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs `graph`. inputs: NumPy arrays or OrtValues, exact dtypes and shapes. Returns OrtValues by
        name.

        Raises: KeyError for a missing input, ValueError for a wrong dtype or shape.
        """
        session, signature = self._session(graph), self._bundle.manifest.graphs[graph]
        binding = session.io_binding()
        for spec in signature.inputs:
            binding.bind_ortvalue_input(spec.name, self._to_device(inputs[spec.name], graph, spec))
        for spec in signature.outputs:
            binding.bind_output(spec.name, self._device)
        session.run_with_iobinding(binding)
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
        with self._lock:
            if graph not in self._sessions:
                self._sessions[graph] = self._open(graph)
            return self._sessions[graph]

    def _open(self, graph: str) -> Any:
        signature = self._bundle.manifest.graphs[graph]
        with self._bundle.reading(graph) as path:
            try:
                session = onnxruntime.InferenceSession(
                    str(path), self._options, providers=[PROVIDERS[self._device]]
                )
            except Exception as error:  # onnxruntime's own exception types are not public
                reason = " ".join(str(error).split())
                raise BundleError(
                    f"bad bundle: {str(path)!r} does not load: {reason:.300}; {REPAIR}"
                ) from error
        if PROVIDERS[self._device] not in session.get_providers():
            raise InputError(f"device {self._device!r} does not start; see onnxruntime's message above")
        session.disable_fallback()
        for side, specs, found in (
            ("inputs", signature.inputs, session.get_inputs()),
            ("outputs", signature.outputs, session.get_outputs()),
        ):
            real = tuple(TensorSpec(t.name, DTYPES.get(t.type, t.type), tuple(t.shape)) for t in found)
            if real != specs:
                raise BundleError(
                    f"bad bundle: the {side} of {str(path)!r} are not those in the manifest: "
                    f"{_difference(real, specs)}; {REPAIR}"
                )
        return session


def _difference(real: tuple[TensorSpec, ...], specs: tuple[TensorSpec, ...]) -> str:
    only = [f"{s.name} {s.dtype} {list(s.shape)} in the {place}" for place, here, there in
            (("graph", real, specs), ("manifest", specs, real)) for s in here if s not in there]  # fmt: skip
    return ", ".join(only) or "another order"
