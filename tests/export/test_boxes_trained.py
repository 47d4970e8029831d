"""Weights that were trained with boxes: from training to frames."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conceptmaster import Concept, Pipeline  # noqa: E402
from conceptmaster.runtime.bundle_format.manifest import load  # noqa: E402
from conceptmaster.runtime.bundle_format.schema import Boxes  # noqa: E402

LEFT, MOVING = (0.0, 0.0, 0.5, 1.0), {0: (0.5, 0.0, 1.0, 0.5), 4: (0.5, 0.5, 1.0, 1.0)}


def saved(source, folder):
    """Weights as training writes them."""
    from conceptmaster.engine.checkpoints.safetensors_io import save, save_model

    folder.mkdir(parents=True)
    save_model(source.model, folder / "model.safetensors")
    save(folder / "vae.safetensors", source.vae.state_dict())
    (folder / "tokenizer.json").write_text(source.tokenizer)
    return folder


@pytest.fixture(scope="module")
def trained(source_for, tmp_path_factory):
    """A folder of weights that were trained for three steps with boxes; what they cost falls."""
    source = source_for(mask="boxes")
    model, config = source.model.train(), source.model.config
    n, labels = config.concept.max_concepts, config.concept.label_tokens
    g = torch.Generator().manual_seed(0)
    asked = {
        "latents": torch.randn(2, *config.latent_shape, generator=g),
        "time": torch.tensor([200.0, 700.0]),
        "token_ids": torch.randint(2, 200, (2, config.text_tokens), generator=g),
        "token_mask": torch.ones(2, config.text_tokens, dtype=torch.bool),
        "pixels": torch.randn(2, n, 3, config.concept.picture_size, config.concept.picture_size, generator=g),
        "label_ids": torch.randint(2, 200, (2, n, labels), generator=g),
        "label_mask": torch.ones(2, n, labels, dtype=torch.bool),
        "concept_mask": torch.tensor([[True, True, False], [True, False, False]]),
        "boxes": torch.rand(2, 8, n, generator=g) < 0.5,
    }
    wanted, costs = torch.randn(2, *config.latent_shape, generator=g), []
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(3):
        cost = (model.velocity(**asked) - wanted).square().mean()
        optimiser.zero_grad()
        cost.backward()
        optimiser.step()
        costs.append(cost.item())
    assert costs[0] > costs[1] > costs[2]
    model.eval()
    return saved(source, tmp_path_factory.mktemp("trained") / "weights")


@pytest.fixture(scope="module")
def boxed(trained, bundle, taken_from, tmp_path_factory):
    """Its bundle, with the weights inside; its VAE is that of the tiny preset."""
    from conceptmaster.cli import main

    folder = tmp_path_factory.mktemp("boxed") / "bundle"
    with taken_from(bundle, "decode_first", "decode"):
        assert main(["export", str(trained), "--output", str(folder), "--quiet"]) == 0
    shutil.copytree(trained, folder / "weights")
    return folder


def frames(folder, boxes, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    concepts = [Concept("a", pixels[0]), Concept("b", pixels[1])]
    with Pipeline.from_bundle(folder, threads=1, **options) as pipeline:
        return pipeline("a and b", concepts, steps=3, guidance=4.0, seed=1, boxes=boxes).frames.astype(int)


def test_what_such_a_bundle_says(boxed, trained):
    manifest = load(boxed)
    assert manifest.boxes == Boxes(per_concept=2, required=False) and manifest.takes("boxes")
    assert manifest.model["concept"]["mask"] == "boxes" and manifest.format == 3
    (spec,) = (spec for spec in manifest.graphs["denoise"].inputs if spec.name == "boxes")
    assert (spec.dtype, spec.shape) == ("bool", (8, 3))


def test_verify_holds_it_to_its_weights(boxed, command):
    code, out, _ = command("verify", boxed, "--quiet")
    assert code == 0 and "denoise" in out


@pytest.mark.parametrize("boxes", [{"a": LEFT}, {"a": LEFT, "b": MOVING}, {}], ids=str)
def test_both_backends_make_the_same_frames(boxed, boxes):
    expected = frames(boxed, boxes)
    assert np.abs(frames(boxed, boxes, backend="torch") - expected).max() <= 1
    if boxes:
        assert np.abs(expected - frames(boxed, {})).max() > 5
        assert (frames(boxed, {label: (0, 0, 1, 1) for label in boxes}) == frames(boxed, {})).all()


def test_without_graphs_it_is_for_the_torch_backend(tmp_path, command):
    command("export", "preset:tiny", "--output", tmp_path / "new", "--boxes", "--no-graphs", "--quiet")
    boxes = {"b": MOVING}
    found = frames(tmp_path / "new", boxes, backend="torch")
    assert np.abs(found - frames(tmp_path / "new", {}, backend="torch")).max() > 5


@pytest.mark.parametrize("injection", ["merged", "none"])
def test_an_injection_that_cannot_is_told_before_anything_is_made(
    source_for, tmp_path, command, injection, monkeypatch
):
    from conceptmaster.engine.checkpoints import source as sources

    made = source_for(injection=injection)
    monkeypatch.setattr(sources, "open_source", lambda *_: made)
    code, _, error = command("export", "weights", "--output", tmp_path / "new", "--boxes")
    assert code == 2 and error.count("\n") == 1 and not (tmp_path / "new").exists()
    assert f"'boxes' is for the injections standalone and shared_query, not for '{injection}'" in error


def test_an_adapter_keeps_its_mask(source_for, tmp_path):
    from conceptmaster.engine.checkpoints.adapter import load_adapter, read_adapter, save_adapter

    source = source_for(mask="boxes")
    save_adapter(source.model, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").concept == source.model.config.concept
    load_adapter(source.model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("injection", ["standalone", "shared_query"])
def test_in_int8_too(source_for, tmp_path, run, injection):
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.onnx_graphs.int8 import quantise
    from conceptmaster.export.onnx_graphs.trace import export_graph
    from conceptmaster.export.verify import TOLERANCES, relative_error

    source = source_for(injection=injection, mask="boxes")
    (spec,) = (s for s in graph_specs(source.model, source.vae) if s.name == "denoise")
    export_graph(spec, tmp_path / "denoise.onnx")
    quantise(tmp_path / "denoise.onnx")
    sample = spec.sample(1)
    expected, found = spec.run(sample)["next_state"], run(tmp_path / "denoise.onnx", sample)["next_state"]
    assert relative_error(found, expected.numpy()) < TOLERANCES["int8"]
    assert not sample["boxes"].all() and sample["boxes"].any(0).all()
    hidden = ~(sample["boxes"][None] & sample["concept_mask"][:, None]).any(-1)  # [K,S]
    assert hidden[-1].any() and not hidden[-1].all()


@pytest.mark.slow
def test_a_base_whose_weights_stay_on_disk_can_have_them(wan_folder, tmp_path, command, monkeypatch):
    """Its graphs are held to it at a small video, which has fewer tokens."""
    from conceptmaster.engine.checkpoints import lazy_weights

    monkeypatch.setattr(lazy_weights, "MIN_ELEMENTS", 64)
    asked = ("--output", tmp_path / "new", "--size", "128x96", "--frames", 9, "--boxes", "--quiet")
    code, out, error = command("export", wan_folder, *asked)
    assert code == 0, error
    assert out.count("(small video)") == out.count(" ok") == 8
    assert load(tmp_path / "new").graphs["denoise"].input("boxes").shape == (3 * 6 * 8, 4)
    assert command("verify", tmp_path / "new", "--source", wan_folder, "--quiet")[0] == 0
