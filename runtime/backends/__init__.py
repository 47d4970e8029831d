"""Backends run a bundle's graphs and keep the arrays between them on their device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from ..bundle import Bundle

DEVICES = ("cpu", "cuda", "tensorrt", "rtx")


class Backend(Protocol):
    """What the pipeline needs. An array is a NumPy array or one that `run` returned; nobody else looks
    inside.
    """

    def load(self, graphs: Iterable[str]) -> None:
        """Makes these graphs ready, so that a later `run` does not pay for it. Raises BundleError."""
        ...

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a graph on the inputs that its signature names; entries that it does not use are ignored."""
        ...

    def to_host(self, array: Any) -> np.ndarray:
        """An array as NumPy; waits until it is computed."""
        ...


def open_backend(bundle: Bundle, device: str, threads: int | None) -> Backend:
    """The backend for `device`; "tensorrt" and "rtx" run engines that `conceptmaster build` made. threads:
    CPU threads, None for one per core.

    Raises: InputError for an unknown or absent device; MissingDependency.
    """
    if device not in DEVICES:
        raise InputError(f"unknown device {device!r}: choose one of {', '.join(DEVICES)}")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads must be a positive integer, not {threads!r}")
    if device in ("tensorrt", "rtx"):
        from .tensorrt_backend import TensorRTBackend

        return TensorRTBackend(bundle, device)
    from .onnxruntime_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, device, threads)
