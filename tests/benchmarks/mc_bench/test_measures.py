"""The learned measures with tiny random models: ranges, order, a crop of itself, swapped pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("cv2")

from conceptmaster.benchmarks.mc_bench import embedders, measures, regions  # noqa: E402
from conceptmaster.benchmarks.mc_bench.measures import Caption, Concepts, Watched  # noqa: E402
from conceptmaster.benchmarks.mc_bench.samples import Sample  # noqa: E402
from conceptmaster.benchmarks.mc_bench.videos import Clip  # noqa: E402
from conceptmaster.engine.checkpoints.pretrained import open_pretrained  # noqa: E402
from conceptmaster.errors import WeightsError  # noqa: E402

from .conftest import textured  # noqa: E402

A, B = textured(32, 32, seed=1), 255 - textured(32, 32, seed=2) // 3


@pytest.fixture(scope="module")
def clip(models):
    return embedders.Clip(open_pretrained(models["clip"], embedders.CLIP))


@pytest.fixture(scope="module")
def dino(models):
    return embedders.Dino(open_pretrained(models["dino"], embedders.DINO))


class Halves:
    """Concept i is the i-th square of 32 pixels, or nowhere."""

    def __init__(self, version: int, lost: int | None = None) -> None:
        self.version, self.lost = version, lost

    def find(self, frames, labels, indices, name):
        return [
            [None if n == self.lost else regions.Region((32 * n, 0, 32 * n + 32, 32))] * len(frames)
            for n in range(len(labels))
        ]


def watched(pictures=(A, B), labels=("dog", "cat")) -> Watched:
    """A video that shows A on the left and B on the right."""
    frames = np.stack([np.concatenate([A, B], axis=1)] * 2)
    sample = Sample("x", "a dog and a cat.", labels, (Path("a"), Path("b")), 0)
    return Watched(sample, Clip(frames, 8.0), list(pictures), (0, 1))


def concepts(clip, dino, version: int, lost: int | None = None) -> Concepts:
    return Concepts(lambda: Halves(version, lost), version, lambda: clip, lambda: dino, None)


@pytest.mark.parametrize("version", [1, 2])
def test_a_crop_of_itself_is_one_and_swapped_pictures_are_lower(clip, dino, version):
    part = concepts(clip, dino, version)
    own, swapped = part.measure(watched()), part.measure(watched((B, A)))
    known = {1: "decoupling ", 2: ""}[version]
    for name in (f"{known}CLIP-I", f"{known}DINO-I"):
        assert own[name] == pytest.approx(1, abs=1e-5)
        assert swapped[name] < own[name] - 1e-4
    assert own["found"] == 1
    assert set(own) <= set(measures.MEASURES)
    assert ("CLIP-tag_dis" in own) == (version == 2)


def test_order_of_concepts_does_not_matter(clip, dino):
    class Turned(Halves):
        def find(self, *args):
            return super().find(*args)[::-1]

    straight = concepts(clip, dino, 2).measure(watched())
    part = Concepts(lambda: Turned(2), 2, lambda: clip, lambda: dino, None)
    turned = part.measure(watched((B, A), ("cat", "dog")))
    assert turned == pytest.approx(straight)


def test_ranges_and_what_they_are(clip, dino):
    values = concepts(clip, dino, 2).measure(watched()) | Caption(lambda: clip, None).measure(watched())
    assert all(-100 <= value <= 100 for value in values.values())
    assert all(-1 <= values[name] <= 1 for name in ("CLIP-I", "DINO-I", "fidelity CLIP-I"))
    # by hand, of the definitions
    seen = clip.pictures([A, B])
    told = clip.texts(["dog", "cat"])
    assert values["CLIP-tag"] == pytest.approx(100 * (seen * told).sum(1).mean(), abs=1e-4)
    assert values["CLIP-tag_dis"] == pytest.approx(100 * (seen * told[::-1]).sum(1).mean(), abs=1e-4)
    assert values["CLIP-cap"] == values["fidelity CLIP-T"]
    with torch.no_grad():  # upstream's own score of frame and caption, without its temperature
        frame = watched().frames[:1]
        pixels = clip.processor(images=list(frame), return_tensors="pt")
        tokens = clip.tokenizer(["a dog and a cat."], return_tensors="pt")
        logits = clip.clip.model(**pixels, **tokens).logits_per_image
    scale = clip.clip.model.logit_scale.exp()
    assert values["CLIP-cap"] == pytest.approx(100 * float((logits / scale).detach()), abs=1e-3)


def test_a_concept_that_is_not_found_counts_as_nothing(clip, dino):
    both = concepts(clip, dino, 2).measure(watched())
    one = concepts(clip, dino, 2, lost=1).measure(watched())
    assert one["DINO-I"] == pytest.approx(both["DINO-I"] / 2)
    assert one["found"] == 0.5
    own, others = measures.to_labels([[None], [None]], np.eye(2))
    assert own == 0 and others is None
    assert measures.to_labels([[np.array([0.6, 0.8])], [None]], np.eye(2)) == pytest.approx((0.3, 0.8))


def test_a_sample_without_concepts_has_its_caption_alone(clip, dino):
    alone = replace(watched(), sample=Sample("x", "a dog", (), (), 0), pictures=[])
    assert concepts(clip, dino, 1).measure(alone) == {}
    assert set(Caption(lambda: clip, None).measure(alone)) == {"fidelity CLIP-T", "CLIP-cap"}


def test_outside_of_a_mask_is_white():
    mask = np.zeros((8, 8), bool)
    mask[2:4, 1:5] = True
    mask[2, 1] = False
    region = regions.masked(mask)
    cut = region.cut(np.full((8, 8, 3), 7, np.uint8))
    assert region.box == (1, 2, 5, 4) and cut.shape == (2, 4, 3)
    assert (cut[0, 0] == 255).all() and (cut[1] == 7).all()
    assert regions.masked(np.zeros((8, 8), bool)) is None
    assert regions.boxed((-3, 1.5, 5, 99), 8, 10) == regions.Region((0, 1, 5, 8))
    assert regions.boxed((12, 0, 20, 8), 8, 10) is None


def test_boxes_are_upstreams_best(models, monkeypatch):
    finder = regions.Owlv2Boxes(open_pretrained(models["owlv2"], regions.OWLV2))
    frame = textured(48, 64)
    monkeypatch.setattr(regions, "SCORE", 0.0)
    inputs = finder.processor(
        text=["a photo of dog", "a photo of cat"], images=frame, return_tensors="pt", padding="max_length"
    )
    with torch.no_grad():
        outputs = finder.owlv2.model(**inputs)
    (theirs,) = finder.processor.post_process_grounded_object_detection(
        outputs, threshold=-1, target_sizes=[(48, 64)]
    )
    found = finder.find(frame[None], ["dog", "cat"], [0], "")
    best = outputs.logits[0].argmax(0)
    for of, index in zip(found, best, strict=True):
        assert of[0] == regions.boxed(theirs["boxes"][index].numpy(), 48, 64) is not None
    monkeypatch.setattr(regions, "SCORE", 1.0)
    assert finder.find(frame[None], ["dog", "cat"], [0], "") == [[None], [None]]


def test_clipsegs_masks_share_no_pixel(models):
    finder = regions.ClipSegMasks(open_pretrained(models["clipseg"], regions.CLIPSEG))
    for labels in (["dog"], ["dog", "young man", "cat"]):
        found = finder.find(np.stack([textured(48, 64)] * 2), labels, [0, 1], "")
        masks = [[of[n].mask for of in found if of[n] is not None] for n in range(2)]
        assert len(found) == len(labels) and all(len(of) == 2 for of in found)
        assert all(mask.shape == (48, 64) for frame in masks for mask in frame)
        assert all(np.sum(frame, axis=0).max() <= 1 for frame in masks if frame)


def test_sam2_is_asked_in_its_own_pixels(models, tmp_path, monkeypatch):
    folder = tmp_path / "video"
    folder.mkdir()
    for path in models["sam2"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "sam2_video"})
    )  # as facebook's are
    sam2 = open_pretrained(folder, regions.SAM2)
    finder = regions.Sam2Masks(Halves(1, lost=1), sam2)
    asked = {}
    forward = sam2.model.forward

    def spied(**inputs):
        asked.update(inputs)
        return forward(**inputs)

    monkeypatch.setattr(sam2.model, "forward", spied)
    found = finder.find(np.stack([np.concatenate([A, B], 1)]), ["dog", "cat"], [0], "")
    assert asked["pixel_values"].shape == (1, 3, 64, 64)
    assert asked["input_boxes"].tolist() == [[[0, 0, 32, 64]]]  # of a frame of 64 × 32
    assert found[1] == [None]
    assert found[0][0] is None or found[0][0].mask.shape == (32, 64)


def test_the_aesthetic_head(clip, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "head.safetensors"
    save_file({"weight": torch.arange(8.0)[None], "bias": torch.tensor([5.0])}, path)
    judge = embedders.Aesthetic.open(clip, path)
    expected = 5 + clip.pictures([A, B]) @ np.arange(8.0)
    assert judge.scores([A, B]) == pytest.approx(expected, abs=1e-5)
    save_file({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="reads 768 numbers, this CLIP gives 8"):
        embedders.Aesthetic.open(clip, path).scores([A])
    save_file({"layers.0.weight": torch.zeros(1, 768)}, path)
    with pytest.raises(WeightsError, match="no aesthetic head"):
        embedders.read_head(path)


def test_frames_are_spread_over_the_video():
    assert measures.evenly(77, 16)[::15] == (0, 76) and len(set(measures.evenly(77, 16))) == 16
    assert measures.evenly(5, 16) == measures.evenly(5, 0) == (0, 1, 2, 3, 4)
