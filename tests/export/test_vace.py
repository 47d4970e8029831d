"""Bases like VACE: videos of reference pictures, against diffusers' WanVACEPipeline."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

PROMPT, NEGATIVE = "a red ball &amp; two\n quick cats  run up", "the rain"
WIDTH, HEIGHT, FRAMES, STEPS, GUIDANCE = 64, 48, 13, 3, 5.0
# of fewer latent frames than references diffusers makes no mask
SIZE = ("--size", f"{WIDTH}x{HEIGHT}", "--frames", FRAMES)
LATENT = (4, 4, HEIGHT // 8, WIDTH // 8)


def picture(seed, width, height):
    """Smooth colours, so that no two ways of scaling agree by chance."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(0, 64, 48), picture(1, 90, 50), picture(2, 33, 101), picture(3, 200, 147)]


@pytest.fixture(scope="module")
def upstream(wan_parts):
    """diffusers' pipeline of tiny parts, whose control shows in the pixels."""
    import diffusers

    parts = wan_parts()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
        own = {"num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 2 * 4 + 64}
        transformer = diffusers.WanVACETransformer3DModel(**plain | own).eval()
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, mean=0.0, std=0.3)
        torch.nn.init.normal_(transformer.vace_patch_embedding.weight, std=1.5)
        for block in transformer.vace_blocks:  # in which the pictures reach the video's tokens
            torch.nn.init.normal_(block.attn1.to_v.weight, std=3.0)
            torch.nn.init.normal_(block.attn1.to_out[0].weight, std=3.0)
            torch.nn.init.normal_(block.proj_out.weight, std=1.0)
    pipeline = diffusers.WanVACEPipeline(**parts | {"transformer": transformer})
    pipeline.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_vace

        # which needs ftfy, and leaves these prompts as they are
        patch.setattr(pipeline_wan_vace, "prompt_clean", pipeline_wan.prompt_clean)
        yield pipeline


@pytest.fixture(scope="module")
def folder(upstream, tmp_path_factory):
    """As diffusers saves it. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-vace"
    upstream.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def bundles(folder, tmp_path_factory):
    """`bundles(2)`: the bundle of so many references, without graphs but for two."""
    from conceptmaster.cli import main

    made = {}

    def build(references):
        if references not in made:
            made[references] = tmp_path_factory.mktemp("bundles") / f"tiny-vace-{references}"
            more = ["--quiet"] if references == 2 else ["--quiet", "--no-graphs"]
            args = ["export", folder, "--output", made[references], *SIZE, "--references", references, *more]
            assert main([str(arg) for arg in args]) == 0
        return made[references]

    return build


def expected(pipeline, images, noise, width=WIDTH, height=HEIGHT):
    """diffusers' frames in 0..255, [F,height,width,3]."""
    return (
        255
        * pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            reference_images=images,
            height=height,
            width=width,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=torch.from_numpy(noise)[None],
            output_type="np",
        ).frames[0]
    )


def held(found, frames):
    """The same to one grey level, of a video in which there is something to see."""
    assert found.shape == frames.shape and found.dtype == np.uint8
    assert frames.std() > 5 and (frames % 255 != 0).mean() > 0.5
    assert abs(found - frames).max() <= 1.0


def noise_for(references, seed=0):
    shape = (LATENT[0], LATENT[1] + references, *LATENT[2:])
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("references", [1, 2, 3, 4])
def test_references_give_diffusers_frames(upstream, folder, bundles, generated, references):
    """With PyTorch; of two, with ONNX Runtime as well."""
    noise, images = noise_for(references), PICTURES[-references:]
    frames = expected(upstream, images, noise)
    assert abs(frames - expected(upstream, images[::-1], noise)).max() > 2 or references == 1
    bundle = bundles(references)
    held(generated(bundle, images, noise, "--backend", "torch", "--weights", folder), frames)
    if references == 2:
        held(generated(bundle, images, noise), frames)


def test_a_picture_is_fitted_as_there():
    """Sizes of all shapes; both round in float32."""
    from diffusers.video_processor import VideoProcessor
    from PIL import Image

    from conceptmaster.runtime.pictures import fit

    processor, rng = VideoProcessor(vae_scale_factor=8), np.random.default_rng(0)
    for _ in range(20):
        (w, h), (width, height) = rng.integers(8, 200, 2), 16 * rng.integers(3, 20, 2)
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        pixels = processor.preprocess(image, None, None)
        scale = min(height / pixels.shape[2], width / pixels.shape[3])
        size = int(pixels.shape[2] * scale), int(pixels.shape[3] * scale)
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        canvas = torch.ones(3, height, width)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        canvas[:, top : top + size[0], left : left + size[1]] = pixels[0]
        found = fit(image, (int(width), int(height)), "bilinear", (255, 255, 255))
        np.testing.assert_allclose(found, (canvas.permute(1, 2, 0) + 1) * 127.5, atol=0.01)


def test_what_a_manifest_may_say_of_pictures_beside_the_video():
    from conceptmaster.runtime.bundle_format.pictured import FrameConditioning, FramePlacement

    two = tuple(FramePlacement(n, 1, "bilinear") for n in (1, 0))
    assert FrameConditioning(two, 2, 0, 2).beside == 2
    for places, least, dropped, beside in (
        (two, 1, 0, 2),
        (two, 2, 4, 2),
        (two, 2, 0, 1),
        (two, 2, 0, -1),
        ((FramePlacement(0, 2, "bilinear"),), 1, 0, 1),
    ):
        with pytest.raises(ValueError, match="beside must be one latent frame for each picture"):
            FrameConditioning(places, least, dropped, beside)


@pytest.mark.slow
@pytest.mark.parametrize(("references", "width", "height"), [(1, 48, 80), (3, 80, 32), (4, 64, 48)])
def test_graphs_of_other_sizes(upstream, folder, generated, command, tmp_path, references, width, height):
    """With ONNX Runtime; in tiles, too, where the video is larger than one."""
    noise, images = noise_for(references, 1), PICTURES[:references]
    noise = np.resize(noise, (*noise.shape[:2], height // 8, width // 8))
    args = ("--frames", FRAMES, "--size", f"{width}x{height}", "--references", references, "--quiet")
    code, _, err = command("export", folder, "--output", tmp_path / "whole", *args)
    assert code == 0, err
    held(generated(tmp_path / "whole", images, noise), expected(upstream, images, noise, width, height))
    code, _, err = command(
        "export", folder, "--output", tmp_path / "tiles", *args, "--tile", "32x32", "--no-graphs"
    )
    assert code == 0, err
    tiles = generated(tmp_path / "tiles", images, noise, "--backend", "torch", "--weights", folder)
    assert tiles.shape == (FRAMES, height, width, 3)


def test_what_the_bundle_is(folder, bundles, command, tmp_path):
    from conceptmaster.runtime.bundle_format.manifest import load

    manifest = load(bundles(2))
    names = {"text_encoder", "condition", "denoise", "encode_first", "encode", "decode_first", "decode"}
    assert set(manifest.graphs) == names
    assert (manifest.format, manifest.concepts, manifest.fps) == (5, 2, 16.0)
    assert manifest.shapes.latent == LATENT and manifest.denoised == (4, 6, *LATENT[2:])
    assert manifest.graphs["denoise"].input("given").shape == (1, 72, 6, *LATENT[2:])
    assert [place.first for place in manifest.conditioning.placements] == [1, 0]  # as diffusers: reversed
    code, out, _ = command("inspect", bundles(2))
    assert code == 0 and "2, as latent frames 1, 0 beside the video's" in out
    code, out, err = command("verify", bundles(2), "--source", folder)
    assert (code, err) == (0, "") and out.count("ok") == len(names)
    picture(0, 20, 20).save(tmp_path / "a.png")
    for count, message in ((0, "give it 2 pictures"), (1, "give it 2 pictures"), (3, "takes at most 2")):
        concepts = [x for i in range(count) for x in ("--concept", f"thing {i}", tmp_path / "a.png")]
        args = ("--prompt", PROMPT, *concepts, "--output", tmp_path / "a.npy")
        code, out, err = command("generate", "--bundle", bundles(2), *args)
        assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err


def change(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("transformer/config.json", {"_class_name": "WanTransformer3DModel"}, "is VACE's transformer, which"),
        ("transformer/config.json", {"vace_layers": [0]}, "unexpected: vace_blocks.1."),
        ("transformer/config.json", {"vace_layers": [1, 2]}, "vace_layers must be numbers of blocks from 0"),
        ("transformer/config.json", {"vace_layers": ...}, "vace_layers must be numbers of blocks from 0"),
        ("transformer/config.json", {"vace_in_channels": 96}, "vace_in_channels must be 72 for this VAE"),
        ("transformer/config.json", {"image_dim": 16, "added_kv_proj_dim": 24}, "without an image_dim"),
        (
            "model_index.json",
            {"_class_name": "SkyReelsA2WanI2vPipeline"},
            "'SkyReelsA2WanI2vPipeline', which",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(folder, command, tmp_path, path, changes, message):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    change(own / path, **changes)
    code, out, err = command("export", own, "--output", tmp_path / "out", *SIZE, "--no-graphs")
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err


def test_a_number_of_references_that_cannot_be(folder, wan_folder, command, tmp_path):
    for place, references, message in (
        (folder, 0, "references must be 1 to 64, got 0"),
        (folder, 65, "references must be 1 to 64, got 65"),
    ):
        args = ("--output", tmp_path / "out", *SIZE, "--references", references, "--no-graphs")
        code, out, err = command("export", place, *args)
        assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err
    own = tmp_path / "own"
    shutil.copytree(wan_folder, own)
    (own / "model_index.json").write_text(json.dumps({"_class_name": "WanVACEPipeline"}))
    code, out, err = command("export", own, "--output", tmp_path / "out", *SIZE, "--no-graphs")
    assert (code, out) == (2, "") and "its transformer is none of VACE's" in err


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("told", ["vace_layers", "model_type", "shapes"])
def test_original_names(upstream, folder, tmp_path, prefix, told):
    """As Wan's own folder and ComfyUI's files have them, with what Wan's config.json tells, or without."""
    from safetensors.torch import save_file

    from conceptmaster.benchmarks.layouts import wan_transformer as original
    from conceptmaster.engine.checkpoints.single_files import open_weights_at
    from conceptmaster.engine.checkpoints.source import Choices, open_source

    state = upstream.transformer.state_dict()
    file = tmp_path / "vace.safetensors"
    save_file({prefix + original(name): tensor.contiguous() for name, tensor in state.items()}, file)
    own = {"dim": 24, "num_heads": 2, "num_layers": 4, "in_dim": 4, "out_dim": 4, "text_dim": 24, "eps": 1e-6}
    own |= {"_class_name": "VaceWanModel", "ffn_dim": 48, "freq_dim": 16}
    own |= {
        "vace_layers": {"vace_layers": [0, 2], "vace_in_dim": 72},
        "model_type": {"model_type": "vace"},
    }.get(told, {})
    if told != "shapes":
        (tmp_path / "vace.json").write_text(json.dumps(own))
    elif (part := open_weights_at(file)) is not None:  # the tiny heads are the folder's own
        assert {name.removeprefix(prefix) for name in part.tensors} == set(state)
    source = open_source(folder, Choices((64, 48), 13, parts={"transformer": file}, references=2))
    transformer = source.model.transformer
    assert transformer.config.transformer.vace_layers == (0, 2)
    found = transformer.state_dict()
    assert found.keys() == state.keys() and all(found[name].equal(state[name]) for name in state)


@pytest.mark.parametrize(
    ("names", "layers"), [(("vace_blocks.2.a",), 4), (("vace_blocks.x.a",), 4), (("vace_blocks.0.a",), "4")]
)
def test_hints_of_no_known_place(names, layers):
    import types
    from pathlib import Path

    from conceptmaster.engine.checkpoints.derived import derive
    from conceptmaster.errors import ConfigError

    shapes = {"patch_embedding.weight": (24, 4, 1, 2, 2), "vace_patch_embedding.weight": (24, 72, 1, 2, 2)}
    shapes |= {"condition_embedder.text_embedder.linear_1.weight": (24, 24)} | dict.fromkeys(names, (1,))
    stored = {name: types.SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    told = {"_class_name": "VaceWanModel", "dim": 24, "num_heads": 2, "num_layers": layers}
    with pytest.raises(ConfigError, match="do not tell where the hints go"):
        derive("transformer", stored, Path("vace.safetensors"), told)


def test_shapes_tell_a_vace():
    import types

    from conceptmaster.engine.checkpoints.derived import derive
    from conceptmaster.engine.dit import ConceptDiT
    from conceptmaster.engine.presets import preset

    for name in ("wan2.1-vace-1.3b", "wan2.1-vace-14b"):
        wanted = preset(name).transformer
        with torch.device("meta"):
            state = ConceptDiT(preset(name)).state_dict()
        stored = {key: types.SimpleNamespace(shape=value.shape) for key, value in state.items()}
        found = derive("transformer", stored, None, None)
        assert found.pop("_class_name") == "WanVACETransformer3DModel"
        assert {key: tuple(v) if isinstance(v, list) else v for key, v in found.items()} == {
            key: getattr(wanted, key) for key in found
        }
        assert found["vace_layers"] == list(wanted.vace_layers)


def test_a_preview_is_of_the_first_frame_that_is_made(bundles, monkeypatch):
    """Not of a reference."""
    from conceptmaster import Concept, Pipeline

    seen, concepts = [], [Concept(f"thing {i}", PICTURES[i]) for i in range(2)]
    with Pipeline.from_bundle(bundles(2), threads=1) as pipeline:
        decode = pipeline._decode
        monkeypatch.setattr(pipeline, "_decode", lambda x, *more: seen.append(x) or decode(x, *more))
        pipeline(PROMPT, concepts, steps=1, callback=lambda *step: step[2]().shape == (HEIGHT, WIDTH, 3))
        estimate, made = seen
        np.testing.assert_allclose(estimate[:, 0], made[:, 0], atol=1e-5)  # of a single step
        assert made.shape == LATENT
        seen.clear()
        with monkeypatch.context() as patch:  # an empty video is encoded once
            patch.setattr(pipeline, "_encode_nothing", None)
            pipeline(PROMPT, concepts, steps=1)
