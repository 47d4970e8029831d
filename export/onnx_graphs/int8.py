"""Dynamic int8 for CPUs: weights are stored in int8, activations are quantised as they come."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx

from ...runtime.backends.onnxruntime_module import onnxruntime
from ...runtime.bundle_format.graph_list import STEP_GRAPHS

GRAPHS = STEP_GRAPHS
"""What int8 is for: the graphs that run at every step. For `sprites` the five before it take 9 ms together,
once per request, and would put 0.5 to 3 % of error into what all steps read (`condition` 20 %); the decoder
is convolutions, and a video's last step."""

KEPT = ("condition_embedder", "proj_out", "ffn.net.0", "attn1.to_v", "attn1.to_out")
"""Modules that stay float32, because the error demands it. Quantising the last layer too doubles the
velocity's error (`sprites`, random weights): its rounding goes there undamped. Quantising the last three of
these too gives steps of real requests an error of 1.9e-2 instead of 1.2e-2, in 0.7 times the time (half
trained). What is left is the rounding of activations: finer weights, or smoothing between weights and
activations, gain little. The time's layers see one row: nothing to gain."""

LINEAR = ("MatMul", "Gemm")


def precision_of(graph: str, precision: str) -> str:
    """What one graph is stored as in a bundle of `precision`: not all of an int8 bundle is int8."""
    return precision if precision == "fp32" or graph in GRAPHS else "fp32"


def quantise(path: Path) -> None:
    """Turns a graph's linear layers to int8, in place: MatMul and Gemm with a constant matrix.

    Weights are symmetric int8 per output channel, activations asymmetric uint8 per tensor (U8S8), the pair
    that ONNX Runtime has its fastest kernels for (U8U8: 1.4 times the time). Where both factors are
    activations, as in attention, nothing changes.

    x86 CPUs without VNNI (before about 2019) add products up in pairs of 16 bits, which saturate: emulated,
    that makes the velocity's error seven times larger (`sprites`, random weights: 0.10 instead of 0.015).
    Weights of 7 bits (`reduce_range`) cannot saturate, cost no time, and a step's error grows by a tenth: the
    same bundle is right everywhere.
    """
    quantization = importlib.import_module(f"{onnxruntime.__name__}.quantization")
    external = path.with_name(f"{path.name}.data")
    large = external.exists()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".quantise-") as folder, _quiet():
        target = Path(folder, path.name)
        quantization.quantize_dynamic(
            path,
            target,
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=list(LINEAR),
            use_external_data_format=large,
            nodes_to_exclude=_kept(path),
            # what comes out of this project's own nodes has a type that the quantiser does not infer
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        model = onnx.load(str(target), load_external_data=False)
        model.producer_name, model.producer_version = "conceptmaster", ""
        del model.metadata_props[:], model.graph.value_info[:]
        onnx.save_model(model, str(path))
        if large:
            os.replace(target.with_name(external.name), external)


def _kept(path: Path) -> list[str]:
    """Names of the nodes that come from KEPT, and the names that the quantiser gives to a Gemm."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    names = [node.name for node in nodes if node.op_type in LINEAR and any(k in node.name for k in KEPT)]
    return names + [f"{name}_MatMul" for name in names]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice on the root logger, which would also set that logger up for good."""
    log, sink = logging.getLogger(), logging.NullHandler()
    disabled = log.disabled
    log.addHandler(sink)
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = disabled
        log.removeHandler(sink)
