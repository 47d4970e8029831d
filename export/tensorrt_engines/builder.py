"""One prepared graph to one TensorRT engine, with either library: TensorRT or TensorRT for RTX.

TensorRT builds for the GPU that it runs on; TensorRT for RTX builds without a GPU, for the target it is told.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConceptMasterError, ExportError, InputError, MissingDependency
from ...runtime.backends import tensorrt_backend

OLDEST_VERSION = (10, 13)  # of the full library: plugins compiled ahead of time, as plugin.py makes them
FUSED_WIDTHS = range(16, 257, 8)
"""Head widths that attention is computed for in 16 bits; with others it stays float32. TensorRT for RTX 1.7.1
has no kernel in 16 bits for heads 8 and 12 wide; it keeps 16, 32 and 128 whole."""
ELSEWHERE = (
    "TensorRT builds on the GPU that the engine is for. Elsewhere: --trtexec --dry-run --target sm_90 "
    "writes what to run there, --flavor rtx builds for RTX cards"
)


@dataclass(frozen=True)
class Limits:
    """workspace: bytes that the builder may use for tactics, None for all there are; level: 0 to 5, how long
    it searches."""

    workspace: int | None = None
    level: int | None = None


@dataclass(frozen=True)
class Built:
    """An engine's bytes, where the library has them; how many layers TensorRT's network had; the names of
    those that are attention, the ones that it keeps whole and the ones that it takes apart into products and
    a softmax."""

    engine: memoryview
    layers: int
    whole_attention: tuple[str, ...]
    decomposed_attention: tuple[str, ...]


def library(flavor: str) -> Any:
    """The library's module. Raises MissingDependency when it does not import or is too old."""
    found = tensorrt_backend.library(flavor)
    version = tuple(int(part) for part in found.__version__.split(".")[:2])
    if flavor == "tensorrt" and version < OLDEST_VERSION:
        raise MissingDependency(f"TensorRT {found.__version__} is too old: 10.13 or newer is needed")
    return found


def gpu_capability() -> int:
    """The compute capability of the first GPU, 90 for sm_90. Raises MissingDependency without cuda-python,
    InputError without a GPU; both say how to build elsewhere."""
    try:
        return tensorrt_backend.gpu_capability()
    except ConceptMasterError as error:
        raise type(error)(f"{error}. {ELSEWHERE}") from error


def build(trt: Any, graph: Path, capability: int | None, limits: Limits, cache: Path | None = None) -> Built:
    """Builds the engine of the graph at `graph`.

    Args: trt: from `library`; capability: 89 for sm_89, None for the GPU that is there (the full library
        knows no other); cache: a timing cache that is read if it is there, and written.
    Raises: ExportError naming the node and the operator that TensorRT does not take, or what its builder
    says; InputError for a capability that the library does not build for.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise ExportError(_parser_errors(graph, parser))
    whole, decomposed = _attention(trt, network)
    config = builder.create_builder_config()
    if limits.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limits.workspace)
    if limits.level is not None:
        config.builder_optimization_level = limits.level
    if capability is not None:
        _aim(trt, config, capability)
    timings = _timing_cache(config, cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        reason = log.last() or "it does not say why"
        raise ExportError(f"TensorRT cannot build the graph {graph_name(graph)}: {reason}")
    if timings is not None and cache is not None:
        cache.write_bytes(bytes(timings.serialize()))
    return Built(memoryview(engine), network.num_layers, whole, decomposed)


def capabilities(trt: Any) -> list[int]:
    """The compute capabilities that the library builds for without being on such a GPU; none: only its
    own."""
    known = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return sorted(int(name.removeprefix("SM")) for name in known if name.startswith("SM"))


def graph_name(graph: Path) -> str:
    """The name of the graph in a file, which is hidden while its engine is built."""
    return graph.stem.lstrip(".")


def _strongly_typed(trt: Any) -> int:
    """The creation flag that TensorRT 10 needs and 11, whose networks are all so, may one day lack."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _aim(trt: Any, config: Any, capability: int) -> None:
    known = capabilities(trt)
    if capability not in known:
        names = ", ".join(f"sm_{number}" for number in known)
        raise InputError(f"this library builds for {names}, not for sm_{capability}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)


def _attention(trt: Any, network: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Lets attention that there is no kernel for be taken apart; the names of the others, and of these.

    That is float32, and heads of a width that FUSED_WIDTHS lacks. Everything else must be kept whole: taken
    apart unasked it would be slow without a word.
    """
    names: tuple[list[str], list[str]] = ([], [])
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if kind is None or layer.type != kind:
            continue
        q = layer.get_input(0)  # [B,A,S,E]
        apart = q.dtype == trt.DataType.FLOAT or q.shape[-1] not in FUSED_WIDTHS
        names[apart].append(str(layer.name))
        if apart:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    return tuple(names[0]), tuple(names[1])


def _timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    timings = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if timings is None or not config.set_timing_cache(timings, False):
        timings = config.create_timing_cache(b"")  # of another GPU or version: begin again
        config.set_timing_cache(timings, False)
    return timings


def _parser_errors(graph: Path, parser: Any) -> str:
    says = f"TensorRT does not take the graph {graph_name(graph)}"
    if not parser.num_errors:
        return f"{says}, and does not say why"
    error = parser.get_error(0)
    reason = " ".join(error.desc().split())
    where = f"node {error.node_name()!r}, operator {error.node_operator()}: " if error.node_operator() else ""
    more = f"; and {parser.num_errors - 1} more nodes" if parser.num_errors > 1 else ""
    return f"{says}: {where}{reason:.200} ({error.code().name}){more}"


def _log(trt: Any) -> Any:
    """A logger that keeps errors and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: list[str] = []
            self._lock = threading.Lock()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                with self._lock:
                    self._lines.append(" ".join(message.split()))

        def last(self) -> str:
            """What was said last that is not about the GPU that is not there."""
            lines = [line for line in self._lines if "CUDA driver version" not in line]
            return lines[-1][:300] if lines else ""

    return Log()
