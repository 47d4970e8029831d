"""The model repository: every configuration parsed with the server's published schema, and model.py run."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("onnxscript")

from conceptmaster import Pipeline  # noqa: E402
from conceptmaster.cli import main  # noqa: E402
from conceptmaster.export.tensorrt_engines.build import vouch  # noqa: E402
from conceptmaster.runtime.bundle_format import tensorrt_engines as stored  # noqa: E402
from conceptmaster.runtime.bundle_format.find import SHIPPED, Bundle  # noqa: E402
from conceptmaster.runtime.bundle_format.manifest import load  # noqa: E402


@functools.cache
def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    output = tmp_path_factory.mktemp("served") / "models"
    assert main(["export-triton", "sprites", str(output)]) == 0
    return output


def schema():
    """tritonclient's generated model_config_pb2, by its file: the package around it wants grpc."""
    found = importlib.util.find_spec("tritonclient")
    path = Path(found.submodule_search_locations[0], "grpc/model_config_pb2.py") if found else None
    if path is None or not path.is_file():
        pytest.skip("tritonclient is not installed")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_configuration_follows_the_published_schema(repository):
    model_config = schema()
    from google.protobuf import text_format

    manifest = load(SHIPPED / "sprites")
    assert {path.name for path in repository.iterdir()} == {"conceptmaster", *manifest.graphs}
    for folder in repository.iterdir():
        config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config.ModelConfig())
        assert config.name == folder.name and config.max_batch_size == 0
        if folder.name == "conceptmaster":
            assert config.backend == "python" and list(config.output[0].dims) == [17, 64, 64, 3]
            continue
        graph = manifest.graphs[folder.name]
        assert [(t.name, tuple(t.dims)) for t in config.input] == [(s.name, s.shape) for s in graph.inputs]
        assert [(t.name, tuple(t.dims)) for t in config.output] == [(s.name, s.shape) for s in graph.outputs]
        inputs = session(folder / "1" / "model.onnx").get_inputs()
        assert [i.name for i in inputs] == [t.name for t in config.input]


class Tensor:
    def __init__(self, name, array):
        self._name, self.array = name, array

    def as_numpy(self):
        return self.array

    def name(self):
        return self._name

    @classmethod
    def from_dlpack(cls, name, other):
        return cls(name, other.array)


@pytest.fixture
def served(repository, monkeypatch):
    """The model of model.py under a fake of the server, which runs the repository's graphs."""
    server = types.ModuleType("triton_python_backend_utils")
    server.Tensor, server.TritonError = Tensor, lambda message: types.SimpleNamespace(message=lambda: message)

    class InferenceResponse:
        def __init__(self, tensors, error=None):
            self.tensors, self._error = tensors, error

        def has_error(self):
            return self._error is not None

        def error(self):
            return self._error

    class InferenceRequest:
        def __init__(self, model_name, requested_output_names, inputs):
            self.path, self.names = repository / model_name / "1" / "model.onnx", requested_output_names
            self.inputs = inputs

        def exec(self):
            found = session(self.path).run(self.names, {t.name(): t.as_numpy() for t in self.inputs})
            return InferenceResponse([Tensor(n, v) for n, v in zip(self.names, found, strict=True)])

    server.InferenceRequest, server.InferenceResponse = InferenceRequest, InferenceResponse
    server.get_output_tensor_by_name = lambda response, name: next(
        t for t in response.tensors if t.name() == name
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    monkeypatch.delitem(sys.modules, "conceptmaster.runtime.backends.triton_server", raising=False)
    spec = importlib.util.spec_from_file_location("model", repository / "conceptmaster" / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_repository": str(repository / "conceptmaster"), "model_version": "1"})
    return model


def ask(*more, **given):
    """A request with these inputs; more: tensors that it has besides."""
    tensors = [Tensor(name, np.array(value)) for name, value in given.items()]
    return types.SimpleNamespace(inputs=lambda: [*tensors, *more])


def test_the_served_video_is_the_pipelines(served):
    picture = np.full((1, 8, 8, 3), 200, np.uint8)
    request = ask(PROMPT=[b"a ball rolls left"], LABELS=[b"ball"], PICTURES=picture, SEED=[3], STEPS=[2])
    (answer,) = served.execute([request])
    from conceptmaster import Concept

    pipeline = Pipeline.from_bundle("sprites", threads=1)
    expected = pipeline("a ball rolls left", [Concept("ball", picture[0])], seed=3, steps=2).frames
    found = answer.tensors[0].as_numpy()
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 1


LATIN = "Zürich".encode("latin-1")
MALFORMED = [
    (ask(PROMPT=[b"a"], LABELS=[b"ball"]), "1 LABELS for 0 PICTURES: one label for each picture"),
    (ask(PROMPT=[b"a"], PICTURES=np.zeros((1, 8, 8, 3), np.uint8)), "0 LABELS for 1 PICTURES: one label"),
    (ask(), "PROMPT is missing"),
    (ask(PROMPT=[b"a", b"b"]), "PROMPT must be one value, not 2"),
    (ask(PROMPT=np.array([], object)), "PROMPT must be one value, not 0"),
    (ask(Tensor("PROMPT", np.array([b"b"])), PROMPT=[b"a"]), "PROMPT is given twice"),
    (ask(PROMPT=[LATIN]), "PROMPT is not UTF-8: invalid start byte at byte 1"),
    (ask(PROMPT=[b"a"], LABELS=[LATIN], PICTURES=np.zeros((1, 8, 8, 3), np.uint8)), "LABELS is not UTF-8"),
    (ask(PROMPT=[b"a"], SEED=np.array([], np.int64)), "SEED must be one value, not 0"),
    (ask(PROMPT=[b"a"], STEPS=[2, 3]), "STEPS must be one value, not 2"),
    (ask(PROMPT=[b"a"], STEPS=[0]), "steps must be"),
    (ask(PROMPT=[b"a"], BOXES=[b"{"]), "BOXES is not JSON"),
    (ask(PROMPT=[b"a"], BOXES=[b"{}", b"{}"]), "BOXES must be one value, not 2"),
    (ask(PROMPT=[b"a"], BOXES=[b'{"cat": [0, 0, 1, 1]}']), "a box for 'cat', but no concept"),
    (ask(PROMPT=[b"a"], GUIDANCE=np.array([np.nan], np.float32)), "guidance must be"),
]


@pytest.mark.parametrize(("request_", "words"), MALFORMED)
def test_a_malformed_request_fails_alone(served, request_, words):
    good = ask(PROMPT=[b"a ball"], STEPS=[1])
    first, bad, last = served.execute([good, request_, good])
    assert words in bad.error().message() and bad.tensors == []
    assert not first.has_error() and not last.has_error()


def test_a_fault_of_the_program_takes_no_other_request_with_it(served, monkeypatch):
    generate = served.pipeline.generate

    def fail(request):
        if request.prompt == "bad":
            raise KeyError("lost")
        return generate(request)

    monkeypatch.setattr(served.pipeline, "generate", fail)
    bad, good = served.execute([ask(PROMPT=[b"bad"]), ask(PROMPT=[b"a ball"], STEPS=[1])])
    assert bad.error().message() == "internal error: KeyError: 'lost'" and not good.has_error()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A bundle with engines in two precisions, and of TensorRT for RTX; their contents are made up."""
    folder = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(SHIPPED / "sprites", folder)
    bundle = Bundle.open(folder)
    for flavor, precision in (("tensorrt", "bf16"), ("tensorrt", "fp8"), ("rtx", "fp8")):
        engines = stored.Engines(stored.FORMAT, flavor, "11.4.0", 90, precision, 0, {})
        place = folder / stored.FOLDER / engines.folder_name
        place.mkdir(parents=True)
        for name in bundle.manifest.graphs:
            (place / f"{name}.engine").write_text(f"{flavor} {name} {precision}")
        vouch(place, engines, bundle)
    return folder


@pytest.mark.parametrize("option", [("--precision", "fp8"), ("--engines", "sm90-tensorrt11.4.0-fp8")])
def test_engines_take_the_graphs_places(built, tmp_path, option):
    assert main(["export-triton", str(built), str(tmp_path / "models"), *option]) == 0
    assert (tmp_path / "models/denoise/1/model.plan").read_text() == "tensorrt denoise fp8"
    assert "tensorrt_plan" in (tmp_path / "models/denoise/config.pbtxt").read_text()


@pytest.mark.parametrize("name", ["denoise.onnx", "engines/sm90-tensorrt11.4.0-fp8/denoise.engine"])
@pytest.mark.parametrize("how", ["replaced", "linked", "replaced while it is copied"])
def test_only_verified_bytes_are_copied(built, tmp_path, name, how, monkeypatch, capsys):
    folder = shutil.copytree(built, tmp_path / "bundle")
    (tmp_path / "other").write_text("of somebody else")
    real = shutil.copyfile

    def change(*_):
        (folder / name).unlink()
        if how == "linked":
            shutil.copy(built / name, tmp_path / "other")
            (folder / name).symlink_to(tmp_path / "other")
        else:
            (folder / name).write_bytes((tmp_path / "other").read_bytes())

    def copy(source, target):
        if source == folder / name:
            change()
        return real(source, target)

    if how.endswith("copied"):
        monkeypatch.setattr(shutil, "copyfile", copy)
    else:
        change()
    assert main(["export-triton", str(folder), str(tmp_path / "models"), "--precision", "fp8"]) == 1
    words = {"replaced": "has SHA-256", "linked": "is a link out of the bundle"}
    error = capsys.readouterr().err
    assert f"{name.rpartition('/')[2]}' {words.get(how, 'was changed while it was read')}" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "other"]


def test_a_full_disk_leaves_nothing_in_the_way(tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(28, "No space left on device", str(source), None, str(target))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        assert main(["export-triton", "sprites", str(tmp_path / "models")]) == 1
    error = capsys.readouterr().err
    assert error == f"conceptmaster: error: '{tmp_path}/models': No space left on device\n"
    assert list(tmp_path.iterdir()) == []
    assert main(["export-triton", "sprites", str(tmp_path / "models")]) == 0


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--precision", "fp16"), "no engines 'fp16'"),
        (("--engines", "sm90-rtx11.4.0-fp8"), "not of TensorRT for RTX"),
        (("--engines", "sm90-tensorrt11.4.0-bf16", "--precision", "fp8"), "no engines"),
    ],
)
def test_engines_that_do_not_fit_are_one_line(built, tmp_path, option, words, capsys):
    assert main(["export-triton", str(built), str(tmp_path / "models"), *option]) == 2
    error = capsys.readouterr().err
    assert words in error and "there are: sm90-" in error or "RTX" in error
    assert error.count("\n") == 1 and not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "OUT"], "no bundle 'nothing'"),
        (["sprites", "OUT", "--engines", "sm90"], "no engines 'sm90'"),
        (["sprites", "."], "is there already"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export-triton", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
