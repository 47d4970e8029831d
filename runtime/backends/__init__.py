"""Backends run a bundle's graphs and keep the arrays between them on their device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import InputError
from ..cpus import check_threads

if TYPE_CHECKING:
    import numpy as np

    from ..bundle_format.find import Bundle
    from .pytorch.options import TorchOptions

DEVICES = ("cpu", "cuda", "tensorrt", "rtx")
BACKENDS = ("onnxruntime", "torch")


class Backend(Protocol):
    """What the pipeline needs. An array is a NumPy array or one that `run` returned; nobody else looks
    inside.
    """

    @property
    def latent_frames(self) -> int:
        """How many latent frames `decode` and `encode` take a call, at most."""
        ...

    def load(self, graphs: Iterable[str]) -> None:
        """Makes these graphs ready, so that a later `run` does not pay for it. Raises BundleError."""
        ...

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a graph on the inputs that its signature names; entries that it does not use are ignored."""
        ...

    def to_host(self, array: Any) -> np.ndarray:
        """An array as NumPy; waits until it is computed."""
        ...

    def to_pixels(self, frames: Any) -> np.ndarray:
        """Frames in 0..1 as uint8, rounded, as NumPy. Raises GenerationError when they are not finite."""
        ...

    def close(self) -> None:
        """Gives back what it has loaded and allocated; nothing may be running."""
        ...


def check_choice(
    device: str,
    threads: int | None,
    name: str = "onnxruntime",
    precision: str | None = None,
    gpus: int | None = 1,
) -> None:
    """Raises InputError for arguments of `open_backend` that no bundle goes with: an unknown backend or
    device, a number of threads beyond reason, a precision where no engines run, several GPUs of another
    backend than torch."""
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if device not in DEVICES:
        raise InputError(f"unknown device {device!r}: choose one of {', '.join(DEVICES)}")
    if threads is not None:
        check_threads(threads)
    if precision is not None and device not in ("tensorrt", "rtx"):
        raise InputError("precision chooses between engines: it goes with the device tensorrt or rtx")
    if name == "torch" and device not in ("cpu", "cuda"):
        raise InputError(f"the backend torch runs on cpu or cuda, not on {device!r}")
    if gpus is not None and (isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1):
        raise InputError(f"gpus must be a number of GPUs, 1 or more, not {gpus!r:.60}")
    if gpus != 1 and name != "torch":
        raise InputError(f"one request on several GPUs is for the backend torch, not {name}: --backend torch")


def open_backend(
    bundle: Bundle,
    device: str,
    threads: int | None,
    name: str = "onnxruntime",
    options: TorchOptions | None = None,
    precision: str | None = None,
    gpus: int | None = 1,
) -> Backend:
    """The backend `name` (one of BACKENDS) for `device`; "tensorrt" and "rtx" run engines that are
    built.

    threads: CPU threads, None for one per CPU that is usable (torch: as PyTorch has it); options: of the
    torch backend; precision: of the engines, fp32, fp16, bf16 or fp8, None for the only one that they are
    built in; gpus: how many make one request together, of the torch backend; None: as torchrun has it.
    Raises: InputError for an unknown or absent device, an unknown backend, or options of another one;
        MissingDependency; what the backend raises.
    """
    check_choice(device, threads, name, precision, gpus)
    if name == "torch":
        from .pytorch.backend import TorchBackend

        return TorchBackend(bundle, device, threads, options, gpus)
    bundle.with_graphs()
    if options is not None:
        raise InputError(f"the backend {name} has no such options: they are for the backend torch")
    if device in ("tensorrt", "rtx"):
        if bundle.custom is not None and bundle.custom.deltas:
            raise InputError(
                "engines cannot be changed: merge the delta with `export --custom`, then `build`"
            )
        from .tensorrt_backend import TensorRTBackend

        return TensorRTBackend(bundle, device, precision)
    from .onnxruntime_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, device, threads)
