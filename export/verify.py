"""Holds a bundle's graphs to the PyTorch modules they came from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ..engine.config import ConfigError, ModelConfig
from ..runtime import manifest as manifests
from ..runtime.manifest import Manifest
from .errors import ExportError
from .graphs import GraphSpec, graph_specs
from .quantise import precision_of
from .source import Source

TOLERANCES = {"fp32": 2e-5, "int8": 1e-1}
"""Largest relative error of a graph, see `relative_error`. Measured for `sprites`, half trained, worst graph:
4e-6 in fp32; in int8 3e-2, in the velocity alone and under guidance, which leaves 1e-2 in the state after a
step, and videos that differ by 51 dB. A graph that computes something else is off by 0.5 and more."""

SEEDS = (0, 1)  # of the samples that a graph is compared on


@dataclass(frozen=True)
class Row:
    """One graph against its module, over all outputs and samples.

    max_error: largest absolute difference; relative: see `relative_error`; seconds: what the graph takes for
    one sample, by the clock, on one thread.
    """

    graph: str
    precision: str
    max_error: float
    relative: float
    tolerance: float
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the graph is within its tolerance; not a number is not."""
        return self.relative <= self.tolerance


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over largest value, for the worst slice along the first axis.

    Slices, because the first axis stacks what is used apart: layers, concepts, the solver's states. Where
    `expected` is all zero any difference is infinitely wrong.
    """
    if found.shape != expected.shape:
        return float("inf")
    worst = 0.0
    for a, b in zip(found.astype(np.float64), expected.astype(np.float64), strict=True):
        difference, largest = float(np.abs(a - b).max()), float(np.abs(b).max())
        if difference != 0.0:
            worst = max(worst, difference / largest) if largest else float("inf")
        if np.isnan(difference):
            return float("nan")
    return worst


def check(spec: GraphSpec, path: Path, precision: str) -> Row:
    """Runs the graph at `path` on the CPU and its module on the same samples. Raises ExportError when ONNX
    Runtime cannot load it."""
    try:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types are not public
        raise ExportError(f"ONNX Runtime cannot load {str(path)!r}: {error}", exit_code=1) from error
    wanted = [tensor.name for tensor in session.get_inputs()]
    largest, relative, seconds = 0.0, 0.0, float("inf")
    for seed in SEEDS:
        sample = spec.sample(seed)
        expected = [value.numpy() for value in spec.run(sample).values()]
        feed = {name: sample[name].numpy() for name in wanted}
        start = time.perf_counter()
        outputs: list[Any] = session.run([tensor.name for tensor in spec.outputs], feed)
        seconds = min(seconds, time.perf_counter() - start)
        for a, b in zip(outputs, expected, strict=True):
            largest = float(np.fmax(largest, np.abs(a.astype(np.float64) - b).max()))
            relative = float(np.maximum(relative, relative_error(a, b)))  # not a number stays
    tolerance = TOLERANCES[precision]
    return Row(spec.name, precision, largest, relative, tolerance, seconds)


def verify(bundle: Path, source: Source, progress: bool = False) -> list[Row]:
    """Every graph of the bundle in the folder `bundle`, compared with `source`; a row each.

    Raises ExportError when the bundle was made from another model; BundleError when it is not sound.
    """
    manifest: Manifest = manifests.load(bundle)
    if not _same_model(manifest, source):
        raise ExportError(f"{str(bundle)!r} is a bundle of another model configuration than these weights")
    shapes = manifest.shapes
    specs = graph_specs(
        source.model, source.vae, branches=shapes.branches, solver_states=shapes.solver_states
    )
    return [
        check(spec, bundle / manifest.graphs[spec.name].file, precision_of(spec.name, manifest.precision))
        for spec in steps(specs, "verify", progress)
    ]


def _same_model(manifest: Manifest, source: Source) -> bool:
    """Whether the bundle's configuration, which may have been written before a field was added, is the
    source's."""
    try:
        return ModelConfig.from_dict(manifest.model) == source.model.config
    except ConfigError:
        return False


def steps(specs: list[GraphSpec], label: str, show: bool) -> Any:
    """`specs`, with a progress bar on standard error if `show`."""
    from tqdm import tqdm

    return tqdm(specs, desc=label, unit="graph", disable=not show, leave=False)


def table(rows: list[Row]) -> str:
    """The rows for people, one line each."""
    lines = [f"{'graph':14} {'':5} {'max error':>10} {'relative':>10} {'tolerance':>10} {'ms':>9}"]
    lines += [
        f"{row.graph:14} {row.precision:5} {row.max_error:10.2e} {row.relative:10.2e} {row.tolerance:10.0e} "
        f"{row.seconds * 1e3:9.2f}  {'ok' if row.ok else 'TOO FAR OFF'}"
        for row in rows
    ]
    return "\n".join(lines)
