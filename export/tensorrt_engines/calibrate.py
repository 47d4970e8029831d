"""How large what goes into the matrices of the transformer's blocks becomes, for fp8; and what fp8 costs.

The bundle itself makes a video in few steps on ONNX Runtime's CPU, while the denoise graph (of two experts
both) tells the largest magnitude that it sees in each place. The only file here that runs the pipeline: other
inputs than a real request's give other ranges.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnxscript import ir

from ...errors import InputError, RequestWarning
from ...runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from ...runtime.bundle_format.find import Bundle
from ...runtime.bundle_format.graph_list import STEP_GRAPHS
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
    """largest: graph -> node name -> largest magnitude that goes into it; error: what fp8 does to a step's
    estimate of the latents, the worst step's relative L2 distance from float32, by the same roundings on the
    CPU."""

    largest: dict[str, dict[str, float]]
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
    if unseen := set(STEP_GRAPHS) & set(bundle.manifest.graphs) - set(backend.largest):
        raise InputError(
            f"in {STEPS} steps {', '.join(unseen)} never runs: give a --request with another shift"
        )
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
    """Runs the graphs STEP_GRAPHS with outputs for the largest magnitudes, and keeps what they were given."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "cpu", None)
        self.largest: dict[str, dict[str, float]] = {}
        self._seen = list[tuple[str, dict[str, np.ndarray], np.ndarray]]()
        self._watched: tuple[str, list[list[str]], Any] | None = None

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As every backend; of STEP_GRAPHS the results are NumPy arrays."""
        if graph not in STEP_GRAPHS:
            return super().run(graph, inputs)
        if self._watched is None or self._watched[0] != graph:
            self._watched = None  # let go before the next is there
            with self._bundle.reading(graph) as path:
                model = ir.load(path)
                names = _watch(model)
                session = open_session(ir.to_proto(model).SerializeToString(), path)
            self._watched = graph, names, session
        _, names, session = self._watched
        wanted = [spec.name for spec in self._bundle.manifest.graphs[graph].inputs]
        feed = {name: self.to_host(inputs[name]) for name in wanted}
        found, *sizes = session.run(None, feed)
        self._seen.append((graph, feed, found[ESTIMATE]))
        largest = self.largest.setdefault(graph, {})
        for group, size in zip(names, sizes, strict=True):
            largest |= {name: max(float(size), largest.get(name, 0.0)) for name in group}
        return {"next_state": found}

    def error(self) -> float:
        """See Calibration."""
        worst, self._watched = 0.0, None
        for graph, largest in self.largest.items():
            with self._bundle.reading(graph) as path:
                model = ir.load(path)
                reduce(model, "fp8", largest, emulate=True)
                emulated = open_session(ir.to_proto(model).SerializeToString(), path)
            for feed, expected in ((feed, expected) for own, feed, expected in self._seen if own == graph):
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
