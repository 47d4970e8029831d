"""Graphs that take fewer text tokens, of which one stands for all padding: the same video."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conceptmaster import Pipeline  # noqa: E402
from conceptmaster.errors import InputError  # noqa: E402
from conceptmaster.runtime.bundle_format.manifest import load  # noqa: E402
from conceptmaster.runtime.tokenizer import padding_bias  # noqa: E402

FEW = 24
SAME = ("image_encoder", "qformer", "dam", "decode_first", "decode")
SHORT = ("ball", "a red ball & 2 cats")
REQUEST = {"steps": 3, "guidance": 20.0, "negative": "rain", "seed": 1}


@pytest.fixture(scope="module")
def source():
    """The tiny preset, of the same weights, with a text of 512 tokens."""
    from conceptmaster.engine.checkpoints.source import random_source
    from conceptmaster.engine.presets import preset

    return random_source(dataclasses.replace(preset("tiny"), text_tokens=512))


@pytest.fixture(scope="module")
def full(source, bundle, taken_from, tmp_path_factory):
    """Its bundle, which has its weights inside."""
    from conceptmaster.engine.checkpoints.safetensors_io import save, save_model
    from conceptmaster.export.bundle import write_bundle

    folder = tmp_path_factory.mktemp("full") / "bundle"
    with taken_from(bundle, *SAME):
        write_bundle(source, folder)
    (folder / "weights").mkdir()
    save_model(source.model, folder / "weights" / "model.safetensors")
    save(folder / "weights" / "vae.safetensors", source.vae.state_dict())
    return folder


@pytest.fixture(scope="module")
def few(source, full, taken_from, tmp_path_factory):
    from conceptmaster.export.bundle import write_bundle

    folder = tmp_path_factory.mktemp("few") / "bundle"
    with taken_from(full, *SAME):
        write_bundle(source, folder, text_tokens=FEW)
    shutil.copytree(full / "weights", folder / "weights")
    return folder


def frames(bundle, prompt, **options):
    with Pipeline.from_bundle(bundle, threads=1, **options) as pipeline:
        return pipeline(prompt, **REQUEST).frames.astype(int)


@pytest.mark.parametrize("prompt", SHORT)
def test_the_same_video(full, few, prompt):
    """To one grey level; on the torch backend, too, which leaves padding out of either bundle."""
    expected = frames(full, prompt)
    assert expected.std() > 5 and np.abs(expected - frames(full, "up")).max() > 5
    assert np.abs(frames(few, prompt) - expected).max() <= 1
    for bundle in (full, few):
        assert np.abs(frames(bundle, prompt, backend="torch") - expected).max() <= 1


def test_what_such_a_bundle_is(source, full, few, command):
    manifest, whole = load(few), load(full)
    assert (manifest.format, manifest.whole_text, manifest.shapes.text_tokens) == (4, 512, FEW)
    assert (whole.format, whole.whole_text, whole.shapes.text_tokens) == (3, None, 512)
    assert manifest.prompt_tokens == FEW - 1 and whole.prompt_tokens == 512
    bias = manifest.graphs["denoise"].input("text_bias")
    assert bias is not None and bias.shape == (2, FEW) and bias.dtype == "float32"
    assert whole.graphs["denoise"].input("text_bias") is None
    assert manifest.graphs["denoise"].input("text_keys").shape[2] == FEW
    width = source.model.config.transformer.text_dim
    assert manifest.graphs["text_encoder"].output("text").shape == (1, FEW, width)
    assert "text      23 tokens" in command("inspect", few)[1]


def test_the_server_of_triton_is_told_of_the_bias(few, tmp_path, command):
    assert command("export-triton", few, tmp_path / "models")[0] == 0
    config = (tmp_path / "models" / "denoise" / "config.pbtxt").read_text()
    assert f'input [ {{ name: "text_bias" data_type: TYPE_FP32 dims: [2, {FEW}] }} ]' in config


def test_verify_holds_it_to_its_weights(source, few):
    from conceptmaster.export.verify import verify
    from conceptmaster.runtime.bundle_format.find import Bundle

    assert all(row.ok for row in verify(Bundle.open(few), source))


def test_a_longer_prompt_is_told_before_anything_runs(few, full, monkeypatch):
    pipeline = Pipeline.from_bundle(few, threads=1)
    monkeypatch.setattr(pipeline.backend, "run", lambda *_: pytest.fail("computed something"))
    words = r"takes 31 tokens, 23 are allowed.*--text-tokens 24 \(.*the model reads 512\)"
    for texts in (("b" * 30, "a"), ("a", "b" * 30)):
        with pytest.raises(InputError, match=words) as caught:
            pipeline(texts[0], negative=texts[1], steps=1)
        assert "\n" not in str(caught.value)
    assert frames(full, "b" * 30).shape == (5, 32, 32, 3)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("0", "--text-tokens 0: choose 6 to 24"),
        ("25", "--text-tokens 25: choose 6 to 24"),
        ("5", "--text-tokens 5: choose 6 to 24"),  # its labels have 6
        ("-1", "--text-tokens -1: choose 6 to 24"),
        ("2.5", "invalid int value: '2.5'"),
    ],
)
def test_numbers_that_cannot_be(command, tmp_path, tokens, words):
    code, _, error = command("export", "preset:tiny", "--output", tmp_path / "new", "--text-tokens", tokens)
    assert code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_default_negative_prompt_must_fit(source, tmp_path):
    from conceptmaster.export.bundle import write_bundle

    long = dataclasses.replace(source.sampling, negative="b" * 30)
    with pytest.raises(InputError, match="default negative prompt takes 31 tokens, 23 are .*--text-tokens"):
        write_bundle(dataclasses.replace(source, sampling=long), tmp_path / "new", text_tokens=FEW)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("injection", ["standalone", "merged"])
def test_the_graphs_are_their_modules_and_those_of_the_whole_text(
    source_for, tmp_path, run, assert_close, injection
):
    """A whole text of 300 tokens in the modules, 16 in the graphs."""
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.onnx_graphs.int8 import quantise
    from conceptmaster.export.onnx_graphs.trace import export_graph
    from conceptmaster.export.verify import TOLERANCES, relative_error

    source = source_for(injection=injection)
    config = dataclasses.replace(source.model.config, text_tokens=16)
    specs = {s.name: s for s in graph_specs(source.model, source.vae, config=config, whole_text=300)}
    spec, path = specs["denoise"], tmp_path / "denoise.onnx"
    export_graph(spec, path)
    sample = spec.sample(3)
    expected, found = spec.run(sample)["next_state"], run(path, sample)["next_state"]
    assert_close(found, expected)

    before = specs["condition"].sample(3)
    text = torch.nn.functional.pad(before["text"], (0, 0, 0, 300 - 16))
    tokens = before["concept_tokens"], before["concept_mask"]
    with torch.inference_mode():
        whole = source.model.transformer.condition(text, *tokens)
    given = [sample[name] for name in ("state", "time", "concept_mask", "guidance", "coefficients")]
    from conceptmaster.engine.step import DenoiseStep

    with torch.inference_mode():
        assert_close(found, DenoiseStep(source.model.transformer).eval()(*given, *whole.values()))
    uncounted = {**sample, "text_bias": torch.zeros_like(sample["text_bias"])}
    assert np.abs(run(path, uncounted)["next_state"] - found).max() > 1e-4

    small = path.rename(tmp_path / "int8.onnx")
    quantise(small)
    assert relative_error(run(small, sample)["next_state"], expected.numpy()) < TOLERANCES["int8"]


def test_the_bias_is_the_kernels(assert_close):
    from conceptmaster.kernels import cross_attention

    counts = [0, 3, 7, 8]
    expected = cross_attention.padding_bias(torch.tensor(counts), 8, 512)
    assert np.array_equal(padding_bias(counts, 8, 512), expected)
    assert padding_bias([3], 8, 512)[0, 3] == np.float32(np.log(509))
    assert not padding_bias([8], 8, 8).any()


@pytest.mark.slow
def test_the_shipped_model_makes_the_same_video(taken_from, tmp_path):
    from pathlib import Path

    from conceptmaster.engine.checkpoints.source import open_source
    from conceptmaster.export.bundle import write_bundle
    from conceptmaster.runtime.bundle_format.find import SHIPPED
    from conceptmaster.runtime.request import Request

    examples = Path(__file__).parents[2] / "examples" / "sprites"
    with taken_from(SHIPPED / "sprites", "image_encoder", "qformer", "dam", "decode_first", "decode"):
        write_bundle(open_source(str(examples / "weights")), tmp_path / "few", text_tokens=32)
    request = Request.from_json(examples / "requests" / "first" / "request.json")
    expected, found = (
        Pipeline.from_bundle(bundle, threads=1).generate(request)[0].frames.astype(int)
        for bundle in ("sprites", tmp_path / "few")
    )
    assert np.abs(found - expected).max() <= 1
