"""Other systems' concept parts as bundles: every graph, the host's work, both backends' frames."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conceptmaster import Concept, Pipeline  # noqa: E402
from conceptmaster.engine.rivals import SYSTEMS, like  # noqa: E402
from conceptmaster.errors import BundleError, InputError  # noqa: E402
from conceptmaster.runtime.bundle_format.find import Bundle  # noqa: E402
from conceptmaster.runtime.canvas import Canvas  # noqa: E402

PROMPT = "ab cde"
SHARED = ("text_encoder", "decode_first", "decode")


def picture(seed, width=20, height=20):
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_with_weights(source, folder):
    """The bundle of a source, with its weights inside, as the torch backend wants them."""
    from conceptmaster.engine.checkpoints.safetensors_io import save, save_model
    from conceptmaster.export.bundle import write_bundle

    write_bundle(source, folder)
    (folder / "weights").mkdir()
    save_model(source.model, folder / "weights" / "model.safetensors")
    save(folder / "weights" / "vae.safetensors", source.vae.state_dict())


def source_of(system, tiny):
    from conceptmaster.engine.checkpoints.source import random_source
    from conceptmaster.engine.presets import preset

    return dataclasses.replace(random_source(like(preset("tiny"), system)), vae=tiny.vae)


@pytest.fixture(scope="module")
def folders(tiny, bundle, taken_from, tmp_path_factory):
    """The bundles of all systems by name."""
    from conceptmaster.export.verify import verify

    found = {}
    for system in SYSTEMS:
        source, folder = source_of(system, tiny), tmp_path_factory.mktemp("rivals") / system
        with taken_from(bundle, *SHARED):
            write_with_weights(source, folder)
        assert all(row.ok for row in verify(Bundle.open(folder), source))
        found[system] = folder
    return found


@pytest.fixture(scope="module")
def pipelines(folders):
    """On ONNX Runtime."""
    return {system: Pipeline.from_bundle(folder, threads=1) for system, folder in folders.items()}


def concepts(count=2, labels=("ab", "cde", "f")):
    return [Concept(labels[n], picture(n)) for n in range(count)]


def frames(pipeline, given, **more):
    return pipeline(PROMPT, given, seed=3, steps=2, guidance=4.0, **more).frames.astype(int)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_torch_backend_makes_the_same_frames(system, folders, pipelines):
    own = Pipeline.from_bundle(folders[system], threads=1, backend="torch")
    for count in (0, 1, 2):
        found, expected = (frames(each, concepts(count)) for each in (own, pipelines[system]))
        assert np.abs(found - expected).max() <= 1 and (found != expected).mean() < 1e-2


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_picture_shows(system, pipelines):
    pair, usual = concepts(), frames(pipelines[system], concepts())
    for n in range(2):
        other = list(pair)
        other[n] = Concept(pair[n].label, picture(7 + n))
        assert not np.array_equal(usual, frames(pipelines[system], other))


def test_ip_adapter_reads_no_label_and_the_order_of_pictures(pipelines):
    """All of them are on one picture, whatever they are called."""
    pipeline = pipelines["ip-adapter"]
    usual = frames(pipeline, concepts())
    assert np.array_equal(usual, frames(pipeline, concepts(labels=("x", "another"))))
    assert not np.array_equal(usual, frames(pipeline, concepts()[::-1]))
    assert pipeline.manifest.concepts == 3 and pipeline.manifest.shapes.concepts == 1
    with pytest.raises(InputError, match="4 concepts, but the bundle 'tiny' takes at most 3"):
        frames(pipeline, [Concept(str(n), picture(n)) for n in range(4)])


@pytest.mark.filterwarnings("ignore:the label 'cdx' is not in the caption")
@pytest.mark.parametrize("system", ["ssr-encoder", "ms-diffusion"])
def test_a_label_is_read(system, pipelines):
    usual = frames(pipelines[system], concepts())
    assert not np.array_equal(usual, frames(pipelines[system], concepts(labels=("ab", "cdx"))))


def test_a_mask_has_an_entry_for_each_token_that_a_label_has(pipelines, monkeypatch):
    pipeline, masks = pipelines["ssr-encoder"], []
    run = pipeline.backend.run

    def spied(graph, inputs):
        if graph == "denoise":
            masks.append(np.array(inputs["concept_mask"]))
        return run(graph, inputs)

    monkeypatch.setattr(pipeline.backend, "run", spied)
    frames(pipeline, concepts())
    assert pipeline.manifest.masks_tokens
    found = masks[0].reshape(2, 3, 2, 6)  # branches, concepts, layers, label tokens
    assert not found[0].any() and not found[1, 2].any()
    for concept, length in ((0, 3), (1, 4)):  # "ab" and "cde", and each an end
        assert found[1, concept].tolist() == [[n < length for n in range(6)]] * 2


def test_ms_diffusion_is_told_the_box(pipelines):
    pipeline = pipelines["ms-diffusion"]
    usual = frames(pipeline, concepts())
    whole = frames(pipeline, concepts(), boxes={"ab": (0, 0, 1, 1)})
    assert np.array_equal(usual, whole)
    assert not np.array_equal(usual, frames(pipeline, concepts(), boxes={"ab": (0.1, 0.2, 0.4, 0.9)}))


def test_boxes_hide_single_tokens_too(tiny, folders, taken_from, tmp_path):
    """A mask of tokens beside one of boxes: the same frames from both backends, others than without a box."""
    source = source_of("ssr-encoder", tiny)
    source.model.mask_by("boxes")
    others = [graph for graph in Bundle.open(folders["ssr-encoder"]).manifest.graphs if graph != "denoise"]
    with taken_from(folders["ssr-encoder"], *others):
        write_with_weights(source, tmp_path / "boxes")
    found = {}
    for backend in ("onnxruntime", "torch"):
        pipeline = Pipeline.from_bundle(tmp_path / "boxes", threads=1, backend=backend)
        found[backend] = [frames(pipeline, concepts(), boxes=b) for b in ({}, {"ab": (0.0, 0.0, 0.4, 0.6)})]
    for ours, theirs in zip(*found.values(), strict=True):
        assert np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 1e-2
    whole, placed = found["onnxruntime"]
    assert not np.array_equal(whole, placed)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pictures_are_tiled_as_in_training(count, pipelines):
    """To half a step of a byte and what two bicubic filters differ in; labels and slots as they come."""
    from conceptmaster.engine.encoders import CLIP_MEAN, CLIP_STD
    from conceptmaster.examples.sprites.training.tiling import tiled

    manifest = pipelines["ip-adapter"].manifest
    side = 64
    shapes = dataclasses.replace(manifest.shapes, picture_size=side)
    canvas = Canvas(dataclasses.replace(manifest, shapes=shapes), count)
    images = [picture(n, side, side) for n in range(count)]
    for n, image in enumerate(images):
        canvas.place(n, image)
    assert canvas.frames() == {} and canvas.area() is None
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = torch.zeros(2, 4, 3, side, side)
    filled = torch.zeros(2, 4, dtype=torch.bool)
    for n, image in enumerate(images):
        place = sorted((1, 3, 0)[:count])[n]  # with gaps
        pixels[0, place] = (torch.from_numpy(np.array(image)).movedim(-1, 0) / 255 - mean) / std
        filled[0, place] = True
    found, empty = tiled(pixels, filled) * std + mean
    assert torch.allclose(empty, torch.ones(()), atol=1e-5)
    difference = np.abs(found.movedim(0, -1).numpy() * 255 - canvas.seen())
    assert difference.max() < (0.01 if count == 1 else 2.0)
    white = (canvas.seen() == 255).all(-1).mean()
    assert white == pytest.approx({1: 0, 2: 0.5, 3: 0.25}[count], abs=0.02)


def test_such_bundles_are_of_format_7_and_others_of_theirs(folders, bundle):
    assert {Bundle.open(folder).manifest.format for folder in folders.values()} == {7}
    assert Bundle.open(bundle).manifest.format == 3
    stored = json.loads((bundle / "manifest.json").read_text())
    assert "tiled" not in stored["pictures"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_older_format_is_refused(system, folders):
    manifest = Bundle.open(folders[system]).manifest
    with pytest.raises(ValueError, match="of format 7"):
        dataclasses.replace(manifest, format=6)


def test_tiled_pictures_are_one_concept(folders):
    manifest = Bundle.open(folders["ms-diffusion"]).manifest
    with pytest.raises(ValueError, match="tiled pictures are one concept, without label and frames"):
        dataclasses.replace(manifest, pictures=dataclasses.replace(manifest.pictures, tiled=3))
    with pytest.raises(ValueError, match="tiled must be 0 to 8"):
        dataclasses.replace(manifest.pictures, tiled=9)


def test_masks_that_fit_no_step_are_refused(folders, tmp_path):
    """The graph says how many entries it wants: one of another number is no bundle's."""
    from conceptmaster.runtime.bundle_format import manifest as manifests

    manifest = Bundle.open(folders["ssr-encoder"]).manifest
    graph = manifest.graphs["condition"]
    inputs = tuple(
        dataclasses.replace(spec, shape=(2, 3)) if spec.name == "concept_mask" else spec
        for spec in graph.inputs
    )
    graphs = manifest.graphs | {"condition": dataclasses.replace(graph, inputs=inputs)}
    with pytest.raises((ValueError, BundleError), match="condition wants 'concept_mask' as bool"):
        manifests.save(dataclasses.replace(manifest, graphs=graphs), tmp_path)


def test_what_inspect_says_of_tiled_pictures(folders, command):
    code, out, _ = command("inspect", folders["ip-adapter"])
    assert code == 0
    assert "concepts  up to 3, tiled on one picture of 16×16, 4 tokens\n" in out


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_each_graph_builds(system, tmp_path):
    """With TensorRT for RTX, at the sprites' widths: of heads 8 wide it has no program in 16 bits."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[tensorrt-rtx]'")
    from conceptmaster.engine.checkpoints.source import random_source
    from conceptmaster.engine.presets import preset
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.onnx_graphs.trace import export_graph
    from conceptmaster.export.tensorrt_engines.builder import Limits
    from conceptmaster.export.tensorrt_engines.builder_process import BuilderProcess
    from conceptmaster.export.tensorrt_engines.precision import prepare

    base = preset("sprites")
    base = dataclasses.replace(base, transformer=dataclasses.replace(base.transformer, num_layers=1))
    source, target = random_source(like(base, system)), tmp_path / "graph.onnx"
    for spec in graph_specs(source.model, source.vae):
        if spec.name not in ("image_encoder", "qformer", "dam", "condition", "denoise"):
            continue
        path = tmp_path / f"{spec.name}.onnx"
        export_graph(spec, path)
        for precision in ("fp32", "fp16", "bf16"):
            prepare(path, target, precision)
            with BuilderProcess("rtx", with_plugin=False) as process:
                built = process.build(target, tmp_path / "graph.engine", precision, 89, Limits(level=0), None)
            assert built.layers > 0, (spec.name, precision)
