"""One denoise step of the `sprites` preset, one thread: the runtime's graph in fp32 and int8 against PyTorch,
and against OpenVINO where that is installed. Weights are random; nothing here depends on their values."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .alternating import alternate, report

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

ROUNDS = 100


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def spec(one_thread: None) -> Any:
    """The denoise graph of a random `sprites` model."""
    from conceptmaster.engine.checkpoints.source import random_source
    from conceptmaster.engine.presets import preset
    from conceptmaster.export.graphs import graph_specs

    source = random_source(preset("sprites"))
    return next(spec for spec in graph_specs(source.model, source.vae) if spec.name == "denoise")


def backends(spec: Any, path: Path, name: str) -> dict[str, Any]:
    """One graph file, with one thread, in the runtime's own backend and in OpenVINO."""
    from conceptmaster.export.onnx_graphs.trace import describe
    from conceptmaster.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

    manifest = SimpleNamespace(graphs={spec.name: describe(path, spec)})
    bundle: Any = SimpleNamespace(manifest=manifest, reading=lambda graph: contextlib.nullcontext(path))
    opened: dict[str, Any] = {f"onnxruntime {name}": OnnxRuntimeBackend(bundle, "cpu", 1)}
    if importlib.util.find_spec("openvino"):
        from .openvino_backend import OpenVinoBackend

        opened[f"openvino {name}"] = OpenVinoBackend(bundle, 1)
    for runtime in opened.values():
        runtime.load([spec.name])
    return opened


def test_denoise_step(benchmark: Any, spec: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch eager, ONNX Runtime and OpenVINO in fp32 and int8; NumPy arrays in, one out."""
    from conceptmaster.export.onnx_graphs.int8 import quantise
    from conceptmaster.export.onnx_graphs.trace import export_graph

    fp32, int8 = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    export_graph(spec, fp32)
    shutil.copy(fp32, int8)
    quantise(int8)
    sample = spec.sample(0)
    arrays = {name: value.numpy() for name, value in sample.items()}
    runtimes = backends(spec, fp32, "fp32") | backends(spec, int8, "int8")

    def run(runtime: Any) -> object:
        return runtime.to_host(runtime.run("denoise", arrays)["next_state"])

    measured = alternate(
        benchmark,
        {"torch eager": lambda: spec.run(sample)["next_state"].numpy()}
        | {name: functools.partial(run, runtime) for name, runtime in runtimes.items()},
        ROUNDS,
    )
    with capsys.disabled():
        print(report(measured, "denoise step, sprites, 1 thread"))
        if importlib.util.find_spec("openvino") is None:
            print("  without OpenVINO, which is not installed: pip install openvino")
