"""Dynamic int8 for CPUs: weights are stored in int8, activations are quantised as they come."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

GRAPHS = ("image_encoder", "qformer", "dam", "denoise")
LINEAR = ("MatMul", "Gemm")


def precision_of(graph: str, precision: str) -> str:
    """What one graph is stored as in a bundle of `precision`: not all of an int8 bundle is int8."""
    return precision if precision == "fp32" or graph in GRAPHS else "fp32"


def quantise(path: Path) -> None:
    """Turns a graph's linear layers to int8, in place: MatMul and Gemm with a constant matrix.

    Weights are symmetric int8 per output channel, activations asymmetric uint8 per tensor (U8S8), the pair
    that ONNX Runtime has its fastest kernels for. Where both factors are activations, as in attention,
    nothing changes.
    """
    external = path.with_name(f"{path.name}.data")
    large = external.exists()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".quantise-") as folder, _quiet():
        target = Path(folder, path.name)
        quantize_dynamic(
            path,
            target,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(LINEAR),
            use_external_data_format=large,
            extra_options={"MatMulConstBOnly": True},
        )
        model = onnx.load(str(target), load_external_data=False)
        model.producer_name, model.producer_version = "conceptmaster", ""
        del model.metadata_props[:], model.graph.value_info[:]
        onnx.save_model(model, str(path))
        if large:
            os.replace(target.with_name(external.name), external)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice on the root logger."""
    log = logging.getLogger()
    disabled = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = disabled
