"""OpenVINO running a bundle's graphs, as a rival in benchmarks: a backend that a Pipeline takes.

It does not know this project's own node, so that is written out first, and shapes are inferred.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.inliner
import openvino

from conceptmaster.runtime.backends.graph_backend import GraphBackend

if TYPE_CHECKING:
    from pathlib import Path

    from conceptmaster.runtime.bundle_format.find import Bundle


class OpenVinoBackend(GraphBackend):
    """threads: None for OpenVINO's own choice. compressed: graphs whose weights NNCF brings to 8 bits, with
    which OpenVINO multiplies activations in 8 bits, too; else no fewer bits are computed in than the graph
    says.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, compressed: Collection[str] = ()) -> None:
        self._bundle, self._compressed = bundle, compressed
        self._core = openvino.Core()
        self._options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = str(threads)
        self._requests: dict[str, Any] = {}

    def load(self, graphs: Iterable[str]) -> None:
        """Compiles `graphs`, those that are not yet."""
        for graph in graphs:
            if graph not in self._requests:
                with self._bundle.reading(graph) as path:
                    self._requests[graph] = self._compiled(path, graph in self._compressed)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs `graph` on arrays by name; gives arrays, which the next run does not touch."""
        self.load([graph])
        signature = self._bundle.manifest.graphs[graph]
        request = self._requests[graph]
        request.infer({spec.name: inputs[spec.name] for spec in signature.inputs}, share_inputs=True)
        return {spec.name: request.get_tensor(spec.name).data.copy() for spec in signature.outputs}

    def to_host(self, array: Any) -> np.ndarray:
        """The array, which is there already."""
        return np.asarray(array)

    def close(self) -> None:
        """Lets the graphs go."""
        self._requests.clear()

    def _compiled(self, path: Path, compressed: bool) -> Any:
        model = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(onnx.load(str(path))))
        found = self._core.read_model(model.SerializeToString(), b"")
        if compressed:
            import nncf

            found = nncf.compress_weights(found, mode=nncf.CompressWeightsMode.INT8_ASYM)
        return self._core.compile_model(found, "CPU", self._options).create_infer_request()
