"""Boxes from the command line to frames: a bundle exported with them, in ONNX Runtime and in torch."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conceptmaster import Concept, Pipeline  # noqa: E402
from conceptmaster.runtime.bundle_format.manifest import load  # noqa: E402
from conceptmaster.runtime.bundle_format.schema import Boxes  # noqa: E402

SAME = ("text_encoder", "image_encoder", "qformer", "dam", "condition", "decode_first", "decode")
PROMPT = "a cat and a ball"
CONCEPTS = [
    Concept(label, np.full((16, 16, 3), grey, np.uint8)) for label, grey in (("cat", 30), ("ball", 220))
]
REQUEST = {"steps": 3, "guidance": 20.0, "seed": 1}
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
MOVING = {"cat": {0: LEFT, 4: RIGHT}, "ball": (0.6, 0.6, 0.9, 0.9)}


@pytest.fixture(scope="module")
def placed(tiny, bundle, taken_from, tmp_path_factory):
    """The tiny preset's bundle, exported with boxes from weights that lie beside it."""
    from conceptmaster.cli import main
    from conceptmaster.engine.checkpoints.safetensors_io import save, save_model

    folder = tmp_path_factory.mktemp("placed")
    weights = folder / "weights"
    weights.mkdir()
    save_model(tiny.model, weights / "model.safetensors")
    save(weights / "vae.safetensors", tiny.vae.state_dict())
    shutil.copy(bundle / "tokenizer.json", weights)
    with taken_from(bundle, *SAME):
        assert main(["export", str(weights), "--output", str(folder / "bundle"), "--boxes", "--quiet"]) == 0
    shutil.copytree(weights, folder / "bundle" / "weights")
    return folder / "bundle"


def frames(folder, boxes, **options):
    with Pipeline.from_bundle(folder, threads=1, **options) as pipeline:
        return pipeline(PROMPT, CONCEPTS, boxes=boxes, **REQUEST).frames.astype(int)


def test_what_such_a_bundle_is(placed, bundle):
    manifest, plain = load(placed), load(bundle)
    assert manifest.takes_boxes and manifest.boxes == Boxes(manifest.shapes.latent[1], False)
    tokens = int(np.prod(manifest.grid))
    spec = manifest.graphs["denoise"].input("boxes")
    assert (spec.dtype, spec.shape) == ("bool", (tokens, manifest.shapes.concepts))
    assert plain.boxes is None and not plain.takes_boxes
    assert manifest.format == plain.format


def test_boxes_change_the_video_alike_in_both_backends(placed, bundle):
    free = frames(placed, {})
    np.testing.assert_allclose(free, frames(bundle, None), atol=1)  # without boxes it is the one of before
    everywhere = {"cat": (0.0, 0.0, 1.0, 1.0)}
    np.testing.assert_array_equal(frames(placed, everywhere), free)
    seen = [free]
    for boxes in ({"cat": LEFT}, {"cat": RIGHT}, {"ball": LEFT}, MOVING):
        found = frames(placed, boxes)
        assert all(np.abs(found - other).max() > 2 for other in seen)
        assert np.abs(found - frames(placed, boxes, backend="torch")).max() <= 1
        seen.append(found)


def test_verify_holds_it_to_its_weights(placed, command):
    code, out, err = command("verify", placed, "--source", placed / "weights")
    assert code == 0, out + err
