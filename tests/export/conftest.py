"""What the export's tests share: one bundle of the tiny preset, and sessions on its graphs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("diffusers")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Any:
    """More threads only wait for each other at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def operators_once() -> Any:
    """The exporter makes its table of operators anew for each graph, a fifth of a tiny export: here once."""
    from torch.onnx._internal.exporter import _registration

    registry = getattr(_registration, "ONNXRegistry", None)
    if not hasattr(registry, "from_torchlib") or not hasattr(registry(), "functions"):
        yield  # another torch: slower, otherwise the same
        return
    made: dict[Any, Any] = {}
    build = registry.from_torchlib

    def once(opset_version: int = 18) -> Any:
        if opset_version not in made:
            made[opset_version] = build(opset_version=opset_version)
        fresh = copy.copy(made[opset_version])
        fresh.functions = {name: list(found) for name, found in made[opset_version].functions.items()}
        return fresh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(once))
        yield


@pytest.fixture(scope="session")
def taken_from() -> Callable[..., Any]:
    """`with taken_from(bundle, *graphs):` exports take these graphs from a bundle that has the same; each is
    held to its own module all the same."""

    @contextlib.contextmanager
    def context(folder: Path, *names: str) -> Any:
        from conceptmaster.export import bundle as bundles
        from conceptmaster.export.onnx_graphs.trace import describe, export_graph

        def export(spec: Any, path: Path, show: bool = False) -> Any:
            if spec.name not in names:
                return export_graph(spec, path, show)
            shutil.copy(folder / path.name, path)
            return describe(path, spec)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bundles, "export_graph", export)
            yield

    return context


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`command("export", …)`: exit code, standard output, standard error."""
    from conceptmaster.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def pipeline(wan_parts: Callable[..., dict[str, Any]]) -> Any:
    """diffusers' pipeline of a tiny text-to-video base."""
    from diffusers import WanPipeline

    pipeline = WanPipeline(**wan_parts())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def source_for() -> Callable[..., Any]:
    """`source_for(injection="merged", …)`: the tiny preset with its concept part changed, random weights."""
    from conceptmaster.engine.checkpoints.source import random_source
    from conceptmaster.engine.presets import preset

    def build(**changes: Any) -> Any:
        config = preset("tiny")
        return random_source(
            dataclasses.replace(config, concept=dataclasses.replace(config.concept, **changes))
        )

    return build


@pytest.fixture(scope="session")
def tiny(source_for: Callable[..., Any]) -> Any:
    """The source of `bundle`: the same as "preset:tiny"."""
    return source_for()


@pytest.fixture
def generated(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., np.ndarray]:
    """`generated(bundle, pictures, noise, …)`: the frames that the command line writes, of the PROMPT, the
    NEGATIVE and the STEPS of the test's own file."""

    def call(bundle: Path, pictures: Any, noise: np.ndarray, *more: Any) -> np.ndarray:
        np.save(tmp_path / "noise.npy", noise)
        asked = ["--prompt", request.module.PROMPT, "--negative", request.module.NEGATIVE]
        asked += ["--steps", request.module.STEPS, "--threads", 1]
        for index, image in enumerate(pictures):
            image.save(tmp_path / f"{index}.png")
            asked += ["--concept", f"thing {index}", tmp_path / f"{index}.png"]
        files = ("--noise", tmp_path / "noise.npy", "--output", tmp_path / "video.npy", "--quiet")
        code, _, err = command("generate", "--bundle", bundle, *asked, *files, *more)
        assert code == 0, err
        frames: np.ndarray = np.load(tmp_path / "video.npy")
        return frames

    return call


@pytest.fixture(scope="session")
def bundle(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset's bundle. Not to be changed: copy it first."""
    from conceptmaster.export.bundle import write_bundle

    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    write_bundle(tiny, folder)
    return folder


@pytest.fixture(scope="session")
def specs(tiny: Any) -> dict[str, Any]:
    """The graphs of `bundle` by name."""
    from conceptmaster.export.graphs import graph_specs

    return {spec.name: spec for spec in graph_specs(tiny.model, tiny.vae)}


@pytest.fixture(scope="session")
def int8(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The denoise graph of `bundle` in int8."""
    from conceptmaster.export.onnx_graphs.int8 import quantise

    path = tmp_path_factory.mktemp("int8") / "denoise.onnx"
    shutil.copy(bundle / path.name, path)
    quantise(path)
    return path


@pytest.fixture(scope="session")
def run() -> Callable[..., dict[str, Any]]:
    """`run(path, inputs)`: a graph's outputs by name, as NumPy; inputs that it does not have are left out."""
    import onnxruntime

    sessions: dict[Path, Any] = {}

    def call(path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
        if path not in sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            sessions[path] = onnxruntime.InferenceSession(str(path), options)
        names = [tensor.name for tensor in sessions[path].get_inputs()]
        outputs = sessions[path].run(None, {name: inputs[name].numpy() for name in names})
        return dict(zip((tensor.name for tensor in sessions[path].get_outputs()), outputs, strict=True))

    return call
