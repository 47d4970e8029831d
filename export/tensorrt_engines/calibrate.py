"""How large what goes into the matrices of the transformer's blocks becomes, for fp8; and what fp8 costs.

The bundle itself makes a video in few steps on ONNX Runtime's CPU, while the denoise graph tells the largest
magnitude that it sees in each place. The only file here that runs the pipeline: other inputs than a real
request's give other ranges.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnxscript import ir

from ...errors import RequestWarning
from ...runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from ...runtime.bundle_format.find import Bundle
from ...runtime.bundle_format.graph_list import STEP_GRAPH
from ...runtime.bundle_format.schema import Manifest
from ...runtime.pipeline import Pipeline
from ...runtime.request import Concept, Request
from ..verify import open_session
from .fp8 import linears
from .precision import reduce

STEPS = 4
"""`sprites`: over 20 steps of one of its own requests values become up to 3.9 times as large as over 4 steps
of `example`, for which fp8.py leaves room."""
ESTIMATE = 2  # the state's slot of the newest estimate of the data, see runtime/solver.py


@dataclass(frozen=True)
class Calibration:
    """largest: node name -> largest magnitude that goes into it; error: what fp8 does to a step's estimate of
    the latents, the worst step's relative L2 distance from float32, by the same roundings on the CPU."""

    largest: dict[str, float]
    error: float


def calibrate(bundle: Bundle, request: Request | None = None, show: bool = False) -> Calibration:
    """Makes the video that `request` asks for (None: see `example`) in STEPS steps.

    show: a progress bar on standard error. Raises InputError for a request that the bundle cannot follow.
    """
    asked = replace(request or example(bundle.manifest), samples=1, steps=STEPS)
    backend = _Watching(bundle)
    with warnings.catch_warnings():
        if request is None:  # it means nothing, and need not be in the bundle's words
            warnings.simplefilter("ignore", RequestWarning)
        Pipeline(bundle, backend).generate(asked, progress=show)
    return Calibration(backend.largest, backend.error())


def example(manifest: Manifest) -> Request:
    """A request for any bundle: words, and as many made-up pictures as it takes, two at most."""
    labels = ("a red ball", "a cat")[: manifest.concepts]
    size = 64
    y, x = np.mgrid[:size, :size]
    disc = (x - size / 2) ** 2 + (y - size / 2) ** 2 < (size / 3) ** 2  # [64,64]
    pictures = [
        np.where(disc[:, :, None], colour, 255).astype(np.uint8)
        for colour in ((220, 40, 30), (120, 110, 100))
    ]
    concepts = tuple(Concept(label, picture) for label, picture in zip(labels, pictures, strict=False))
    return Request("a red ball rolls to the left and a cat runs after it", concepts)


class _Watching(OnnxRuntimeBackend):
    """Runs the graph STEP_GRAPH with outputs for the largest magnitudes, and keeps what it was given."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "cpu", None)
        self.largest: dict[str, float] = {}
        self._seen = list[tuple[dict[str, np.ndarray], np.ndarray]]()
        with bundle.reading(STEP_GRAPH) as path:
            model = ir.load(path)
            self._names = _watch(model)
            self._watched = open_session(ir.to_proto(model).SerializeToString(), path)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As every backend; of STEP_GRAPH the results are NumPy arrays."""
        if graph != STEP_GRAPH:
            return super().run(graph, inputs)
        wanted = [spec.name for spec in self._bundle.manifest.graphs[STEP_GRAPH].inputs]
        feed = {name: self.to_host(inputs[name]) for name in wanted}
        found, *sizes = self._watched.run(None, feed)
        self._seen.append((feed, found[ESTIMATE]))
        for names, size in zip(self._names, sizes, strict=True):
            self.largest |= {name: max(float(size), self.largest.get(name, 0.0)) for name in names}
        return {"next_state": found}

    def error(self) -> float:
        """See Calibration."""
        with self._bundle.reading(STEP_GRAPH) as path:
            model = ir.load(path)
            reduce(model, "fp8", self.largest, emulate=True)
            emulated = open_session(ir.to_proto(model).SerializeToString(), path)
        worst = 0.0
        for feed, expected in self._seen:
            found = emulated.run(["next_state"], feed)[0][ESTIMATE]
            worst = max(worst, float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))
        return worst


def _watch(model: ir.Model) -> list[list[str]]:
    """Adds an output for each value that goes into one of `linears`; the names of those it goes into."""
    readers: dict[ir.Value, list[str]] = {}
    for node in linears(model):
        assert node.inputs[0] is not None and node.name is not None
        readers.setdefault(node.inputs[0], []).append(node.name)
    for index, value in enumerate(readers):
        size = ir.node("Abs", [value], name=f"watch_{index}.Abs")
        most = ir.node("ReduceMax", [size.outputs[0]], attributes={"keepdims": 0}, name=f"watch_{index}")
        size.outputs[0].name, most.outputs[0].name = f"watched_{index}.abs", f"watched_{index}"
        most.outputs[0].type, most.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        model.graph.extend([size, most])
        model.graph.outputs.append(most.outputs[0])
    return list(readers.values())
