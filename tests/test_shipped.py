"""What ships works: the bundles open, follow their pictures on held-out looks, and fit their weights."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conceptmaster import Concept, Pipeline
from conceptmaster.examples.sprites.scoring.score import Options, score
from conceptmaster.runtime.bundle_format import DEFAULT

ROOT = Path(__file__).parents[1]
REQUESTS = ROOT / "examples" / "sprites" / "requests"


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_bundle("sprites", threads=1)


@pytest.mark.parametrize("bundle", ["sprites", "sprites-int8"])
def test_concepts_keep_their_own_looks_in_their_own_places(bundle):
    report, _ = score(Options(seeds=range(500, 508), bundle=bundle, controls=False, threads=1))
    assert report["requests"] == 8
    assert report["pair_binding"] >= 0.85  # chance 0.5
    assert report["identity"] >= 0.6  # chance 0.11
    assert report["motion"] >= 0.75  # chance 0.17


def test_swapped_pictures_swap_the_looks():
    report, _ = score(Options(seeds=range(500, 504), threads=1))
    assert report["pair_binding_swapped"] <= 0.25
    assert report["pair_binding"] - report["pair_binding_swapped"] >= 0.6


def test_the_order_of_concepts_does_not_matter(pipeline):
    pictures = [np.full((64, 64, 3), colour, np.uint8) for colour in ((200, 30, 30), (30, 30, 200))]
    concepts = [Concept("ball", pictures[0]), Concept("cat", pictures[1])]
    prompt = "a ball on the left stays still and a cat on the right jumps, in a meadow"
    one = pipeline(prompt, concepts, seed=1, steps=6).frames.astype(int)
    other = pipeline(prompt, concepts[::-1], seed=1, steps=6).frames.astype(int)
    assert np.abs(one - other).max() <= 2


def test_text_alone_makes_a_video(pipeline):
    frames = pipeline("a star in the middle moves up, under a night sky", seed=3, steps=6).frames
    assert frames.shape == (17, 64, 64, 3) and frames.std() > 5


FLOWER = "a flower in the middle moves down and a rocket on the left moves up, at sunset"


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (("flower", "rocket"), []),
        (("Flower", "rocket"), ["'Flower' is not in the caption as the model reads it: it says 'flower'"]),
        (("pink flower", "rocket"), ["it says 'flower'", "does not know 'pink'; the things it knows"]),
        (("banana", "rocket"), ["'banana' is not in the caption", "does not know 'banana'"]),
    ],
)
def test_labels_that_would_give_something_else_are_warned_of(labels, said, tmp_path, capsys):
    from conceptmaster.cli import main

    pictures = [str(REQUESTS / "first" / f"{number}.png") for number in (1, 2)]
    command = ["generate", "--bundle", "sprites", "--prompt", FLOWER]
    command += ["--threads", "1", "--steps", "2", "--quiet", "--json"]
    for label, picture in zip(labels, pictures, strict=True):
        command += ["--concept", label, picture]
    command += ["--output", str(tmp_path / "a.npy")]
    assert main(command) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert all(line.startswith("conceptmaster: warning: the ") for line in lines)
    assert all(word in line for line, word in zip(lines, said, strict=True))
    assert [f"conceptmaster: warning: {line}" for line in json.loads(out)["warnings"]] == lines
    (tmp_path / "a.npy").unlink()
    assert main([*command, "--strict"]) == (2 if said else 0)
    if said:
        out, err = capsys.readouterr()
        assert err.startswith("conceptmaster: error: the ") and err.count("\n") == 1 and "strict" in err
        assert out == "" and not list(tmp_path.iterdir())


EXAMPLES = [
    *(("stickers", name) for name in ("first", "twins", "three", "made-up")),
    *(("sprites", name) for name in ("first", "twins", "three")),
]


@pytest.mark.parametrize(("bundle", "name"), EXAMPLES)
def test_the_example_requests_generate(bundle, name, tmp_path):
    """Stickers' without a word on the bundle: it is the default."""
    command = [sys.executable, "-m", "conceptmaster", "generate", "--json", "--threads", "1"]
    command += [] if bundle == DEFAULT else ["--bundle", bundle]
    command += ["--request", ROOT / "examples" / bundle / "requests" / name / "request.json"]
    command += ["--output", tmp_path / "a.mp4"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["bundle"] == bundle and report["warnings"] == [] and done.stderr == ""
    assert (tmp_path / "a.mp4").stat().st_size > 1000


def test_the_bundle_is_that_of_the_weights(pipeline):
    """Also holds the numbers of a whole request to PyTorch: the concept tokens of a picture and its label."""
    torch = pytest.importorskip("torch")
    from conceptmaster.engine.checkpoints.safetensors_io import load_model
    from conceptmaster.engine.config import ModelConfig
    from conceptmaster.runtime.tokenizer import Tokenizer, padded

    model = load_model(ROOT / "examples" / "sprites" / "weights" / "model.safetensors")
    assert model.config == ModelConfig.from_dict(pipeline.manifest.model)  # a newer field has its default
    pixels = np.random.default_rng(0).standard_normal((4, 3, 64, 64), np.float32)
    tokens = pipeline.backend.run("qformer", pipeline.backend.run("image_encoder", {"pixels": pixels}))
    ids, mask = padded(Tokenizer(pipeline.bundle.tokenizer).encode("first cat", 8, "the label"), 48)
    text = pipeline.backend.run("text_encoder", {"token_ids": ids, "token_mask": mask})
    label = np.repeat(pipeline.backend.to_host(text["text"])[:, :8], 4, axis=0)
    got = pipeline.backend.run(
        "dam", {**tokens, "label_text": label, "label_mask": np.repeat(mask[:, :8], 4, axis=0)}
    )
    ids, mask = torch.from_numpy(ids[:, :8])[None].expand(1, 4, -1), torch.from_numpy(mask[:, :8])[None]
    with torch.no_grad():
        want = model.concepts(torch.from_numpy(pixels)[None], ids, mask.expand(1, 4, -1))[0]
    np.testing.assert_allclose(
        pipeline.backend.to_host(got["concept_tokens"]), want.numpy(), rtol=1e-3, atol=1e-4
    )


# The commands of the README.


@pytest.mark.parametrize("name", ["sprites", "sprites-int8", "stickers"])
def test_a_shipped_bundle_verifies(name, capsys):
    pytest.importorskip("torch")
    from conceptmaster.cli import main

    assert main(["verify", name, "--quiet"]) == 0
    assert capsys.readouterr().out.count(" ok\n") == 8


@pytest.mark.parametrize("name", ["sprites", "stickers"])
def test_the_shipped_weights_export_and_their_bundle_verifies(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    from conceptmaster.cli import main
    from conceptmaster.runtime.bundle_format.find import Bundle

    monkeypatch.chdir(tmp_path)
    weights = str(ROOT / "examples" / name / "weights")
    assert main(["export", weights, "--output", f"./{name}", "--quiet"]) == 0
    assert capsys.readouterr().out.count(" ok\n") == 8
    here, shipped = Bundle.open(f"./{name}"), Bundle.open(name)
    assert here.folder.resolve() == tmp_path / name and shipped.folder.parent.name == "bundles"
    assert here.manifest.source == shipped.manifest.source and here.manifest.source is not None
    assert here.manifest.takes_boxes == shipped.manifest.takes_boxes == (name == "stickers")
    hashes = {file.file: file.sha256 for file in here.manifest.source.files}
    for file in ("model.safetensors", "vae.safetensors"):
        assert hashes[file] == hashlib.sha256(Path(weights, file).read_bytes()).hexdigest()
    assert main(["verify", f"./{name}", "--quiet"]) == 0
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["verify", f"./{name}", "--quiet"]) == 2  # the shipped one goes by its plain name


def test_the_tolerance_has_a_margin_over_both_sides_error_from_float64():
    torch = pytest.importorskip("torch")
    from conceptmaster.engine.checkpoints.source import open_source
    from conceptmaster.export.verify import TOLERANCES, checked_specs, open_session, relative_error
    from conceptmaster.runtime.bundle_format.find import Bundle

    bundle, source = Bundle.open("sprites"), open_source(ROOT / "examples" / "sprites" / "weights")
    for spec in checked_specs(source, 2):
        if spec.name not in ("text_encoder", "decode_first", "decode"):
            continue
        sample = spec.sample(0)
        with bundle.reading(spec.name) as path:
            session = open_session(str(path), path)
        feed = {tensor.name: sample[tensor.name].numpy() for tensor in session.get_inputs()}
        found = session.run([tensor.name for tensor in spec.outputs], feed)
        in_torch = spec.run(sample).values()
        wide = [value.double() if value.is_floating_point() else value for value in sample.values()]
        with torch.inference_mode():
            exact = copy.deepcopy(spec.module).double()(*wide)
        exact = (exact,) if isinstance(exact, torch.Tensor) else exact
        for onnx, ours, right in zip(found, in_torch, exact, strict=True):
            for side in (onnx, ours.numpy()):
                assert relative_error(side, right.numpy()) < TOLERANCES["fp32"] / 2
