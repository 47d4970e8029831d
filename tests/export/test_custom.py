"""A delta from a model to frames: merged at export, handed in to ONNX Runtime and to the torch backend, the
frames are the same; the steps' graph is not touched, and what does not fit is told before anything runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conceptmaster import Pipeline  # noqa: E402
from conceptmaster.cli import main  # noqa: E402
from conceptmaster.delta_file import read_delta, write_delta  # noqa: E402
from conceptmaster.engine.checkpoints.deltas import delta_of, text_keys_values  # noqa: E402
from conceptmaster.engine.checkpoints.source import Choices, open_source  # noqa: E402
from conceptmaster.errors import InputError  # noqa: E402
from conceptmaster.export.bundle import write_bundle  # noqa: E402
from conceptmaster.export.verify import verify  # noqa: E402
from conceptmaster.runtime.backends.pytorch.weights import open_weights  # noqa: E402
from conceptmaster.runtime.bundle_format.find import Bundle  # noqa: E402

PROMPT = "a <fox-1> fox runs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle, two deltas for it, and the bundle that the first is merged into."""
    folder = tmp_path_factory.mktemp("custom")
    source = open_source("preset:tiny")
    transformer = source.model.transformer
    for seed, name in enumerate(("one", "two"), 1):
        g = torch.Generator().manual_seed(seed)
        names = text_keys_values(transformer)
        changes = {n: torch.randn(transformer.get_parameter(n).shape, generator=g) * 0.3 for n in names}
        words = {f"<fox-{seed}>": torch.randn(16, generator=g)}
        path = folder / f"{name}.safetensors"
        write_delta(path, delta_of(path, source.model, {"transformer": changes}, words))
    write_bundle(source, folder / "plain")
    rows = write_bundle(
        open_source("preset:tiny", Choices(custom=(folder / "one.safetensors",))), folder / "merged"
    )
    assert {row.graph for row in rows} == set(Bundle.open(folder / "plain").manifest.graphs)
    return folder


def frames(place, prompt=PROMPT, **how):
    with Pipeline.from_bundle(place, threads=1, **how) as pipe:
        return pipe(prompt, seed=3, steps=3).frames.astype(int)


def test_merged_and_handed_in_give_the_same_frames(folder):
    one = [folder / "one.safetensors"]
    merged = frames(folder / "merged")
    assert np.abs(frames(folder / "plain", custom=one) - merged).max() <= 1
    assert np.abs(frames(folder / "plain", custom=one, backend="torch") - merged).max() <= 1
    assert np.abs(frames(folder / "merged", custom=one, backend="torch") - merged).max() <= 1
    assert np.abs(frames(folder / "plain", "a fox runs") - merged).max() > 20


def test_two_deltas_add_up_and_the_base_stays(folder):
    both = [folder / "one.safetensors", folder / "two.safetensors"]
    said = "a <fox-1> fox and a <fox-2> fox"
    two = frames(folder / "plain", said, custom=both)
    assert np.abs(frames(folder / "plain", said, custom=both, backend="torch") - two).max() <= 1
    assert np.abs(frames(folder / "plain", custom=both[:1]) - frames(folder / "merged")).max() <= 1


def test_the_steps_graph_is_the_same_file(folder):
    plain, merged = (Bundle.open(folder / name).manifest for name in ("plain", "merged"))
    differing = {name for name in plain.graphs if plain.graphs[name].sha256 != merged.graphs[name].sha256}
    assert differing == {"text_encoder", "condition"}
    assert merged.source is not None and [file.file for file in merged.source.custom] == ["one.safetensors"]


def test_verify_finds_the_delta_again(folder):
    bundle = Bundle.open(folder / "merged")
    with pytest.raises(InputError, match="was made with the delta 'one.safetensors'.*--custom FILE"):
        open_weights(bundle, None, Choices())
    source = open_weights(bundle, None, Choices(custom=(folder / "one.safetensors",)))
    assert all(row.ok for row in verify(bundle, source))
    with pytest.raises(InputError, match="made without the delta"):
        open_weights(Bundle.open(folder / "plain"), None, Choices(custom=(folder / "one.safetensors",)))


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_delta_of_another_base(folder, tmp_path, backend):
    delta = read_delta(folder / "one.safetensors")
    object.__setattr__(delta, "bases", {"transformer": "0" * 64})
    write_delta(tmp_path / "other.safetensors", delta)
    with pytest.raises(InputError, match="/other.safetensors' was made for another base"):
        frames(folder / "plain", custom=[tmp_path / "other.safetensors"], backend=backend)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_delta_of_an_expert_that_is_not_there(folder, tmp_path, backend):
    delta = read_delta(folder / "one.safetensors")
    changes = {name.replace("transformer.", "transformer_2."): v for name, v in delta.changes.items()}
    low = dataclasses.replace(delta, bases={"transformer_2": "0" * 64}, changes=changes)
    write_delta(tmp_path / "low.safetensors", low)
    with pytest.raises(InputError, match="/low.safetensors' changes transformer_2, which this model does"):
        frames(folder / "plain", custom=[tmp_path / "low.safetensors"], backend=backend)


def test_words(folder):
    one = [folder / "one.safetensors"]
    with pytest.raises(InputError, match="the prompt does not say <fox-1>, the word of a delta"):
        frames(folder / "plain", "a fox", custom=one)
    with pytest.raises(
        InputError, match="the prompt says <fox-1>, a word that no token stands for.*--custom FILE"
    ):
        frames(folder / "plain")
    with pytest.raises(InputError, match="the prompt says <cat>"):
        frames(folder / "plain", f"{PROMPT} <cat>", custom=one)
    with pytest.raises(InputError, match="/one.*' and the delta '/.*/one.*' both bring the word <fox-1>"):
        frames(folder / "plain", custom=[*one, *one])
    with Pipeline.from_bundle(folder / "plain", threads=1) as pipe:
        with pytest.raises(InputError, match="the negative prompt says <cat>, a word that no token"):
            pipe("a fox runs", negative="a <cat>", steps=1)


def test_on_the_command_line(folder, tmp_path, capsys):
    def run(*more):
        command = [sys.executable, "-m", "conceptmaster", "generate", "--bundle", str(folder / "plain")]
        command += ["--output", str(tmp_path / "a.npy"), "--steps", "2", "--json", "--quiet", *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = run("--prompt", PROMPT, "--custom", str(folder / "one.safetensors"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["outputs"] == [str(tmp_path / "a.npy")]
    refused = run("--prompt", PROMPT, "--custom", str(folder / "one.safetensors"), "--device", "rtx")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "export --custom" in refused.stderr
    (tmp_path / "r.jsonl").write_text('{"prompt": "a fox"}')
    batch = ["generate", "--requests", str(tmp_path / "r.jsonl"), "--output", str(tmp_path / "{name}.npy")]
    for wrong in (tmp_path / "none.safetensors", tmp_path):
        assert main([*batch, "--custom", str(wrong)]) == 2
        assert "cannot read the delta" in capsys.readouterr().err


def test_weights_beside_a_graph_stay_there(folder, tmp_path):
    """As those of large models: the graph that is changed refers to the file."""
    import onnx

    from conceptmaster.runtime.backends.changed_graph import changed
    from conceptmaster.runtime.backends.onnxruntime_backend import BESIDE
    from conceptmaster.runtime.backends.onnxruntime_module import onnxruntime

    bundle = Bundle.open(folder / "plain").with_custom([folder / "one.safetensors"])
    inside = folder / "plain" / "condition.onnx"
    outside = tmp_path / inside.name
    model, beside = onnx.load(inside), "condition.onnx.data"
    onnx.save(model, outside, save_as_external_data=True, location=beside, size_threshold=1024)
    assert (tmp_path / beside).stat().st_size > 8 * 24 * 24 * 4
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(BESIDE, str(tmp_path))
    rng, found = np.random.default_rng(0), []
    for path in (inside, outside):
        session = onnxruntime.InferenceSession(
            changed(path, "condition", bundle.custom), options, providers=["CPUExecutionProvider"]
        )
        if not found:
            inputs = {
                value.name: np.ones(value.shape, bool)
                if value.type == "tensor(bool)"
                else rng.standard_normal(value.shape).astype(np.float32)
                for value in session.get_inputs()
            }
        found.append(session.run(None, inputs))
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["text_encoder", "condition"])
def test_the_graphs_that_change_build(folder, graph, tmp_path):
    """By TensorRT for RTX, into which a delta comes by way of the export."""
    trt = pytest.importorskip("tensorrt_rtx")
    from conceptmaster.export.tensorrt_engines import builder
    from conceptmaster.export.tensorrt_engines.builder import Limits
    from conceptmaster.export.tensorrt_engines.precision import prepare

    prepare(folder / "merged" / f"{graph}.onnx", tmp_path / "graph.onnx", "fp16", None)
    assert builder.build(trt, tmp_path / "graph.onnx", 89, Limits(level=0)).layers > 0
