"""Bases like Wan2.2's TI2V-5B: videos of text, and of a first picture, against diffusers' two pipelines."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

PROMPT, NEGATIVE = "a red ball &amp; two\n quick cats  run up", "the rain"
SIDE, FRAMES, STEPS, GUIDANCE = 64, 9, 3, 5.0
SIZE = ("--size", f"{SIDE}x{SIDE}", "--frames", FRAMES)
LATENT = (4, 3, 4, 4)


def picture(seed, width, height):
    """Smooth colours, so that no two ways of scaling agree by chance."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def parts(wan_parts):
    """Those of a tiny Wan, but for the VAE, which is of Wan2.2's kind; its frames have something to see."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=16,
            z_dim=4,
            dim_mult=[1, 1, 2, 2],
            num_res_blocks=1,
            latents_mean=[0.3, -0.2, 0.1, 0.0],
            latents_std=[1.5, 0.7, 1.0, 2.0],
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=16,
        )
    return wan_parts() | {"vae": vae.eval()}


@pytest.fixture(scope="module")
def pipelines(parts):
    """diffusers' for text and for a picture, of the same parts."""
    from diffusers import WanImageToVideoPipeline, WanPipeline
    from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v

    found = [kind(**parts, expand_timesteps=True) for kind in (WanPipeline, WanImageToVideoPipeline)]
    for pipeline in found:
        pipeline.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        # the one for images needs ftfy, which leaves these prompts as they are
        patch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)
        yield found


@pytest.fixture(scope="module")
def folder(pipelines, tmp_path_factory):
    """As diffusers saves it. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-ti2v"
    pipelines[0].save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory):
    """Its bundle."""
    from conceptmaster.cli import main

    bundle = tmp_path_factory.mktemp("bundles") / "tiny-ti2v"
    assert main(["export", str(folder), "--output", str(bundle), *map(str, SIZE), "--quiet"]) == 0
    return bundle


@pytest.fixture
def generated(command, tmp_path):
    """`generated(bundle, image, noise, …)`: the frames that the command line writes; image may be None."""

    def call(bundle, image, noise, *more):
        np.save(tmp_path / "noise.npy", noise)
        request = ["--prompt", PROMPT, "--negative", NEGATIVE, "--steps", STEPS, "--threads", 1]
        if image is not None:
            image.save(tmp_path / "picture.png")
            request += ["--concept", "the start", tmp_path / "picture.png"]
        files = ("--noise", tmp_path / "noise.npy", "--output", tmp_path / "video.npy", "--quiet")
        code, _, err = command("generate", "--bundle", bundle, *request, *files, *more)
        assert code == 0, err
        return np.load(tmp_path / "video.npy")

    return call


def upstream(pipelines, image, noise, guidance=GUIDANCE):
    """diffusers' frames in 0..255, [F,height,width,3]."""
    shape = {"height": SIDE, "width": SIDE, "num_frames": FRAMES}
    sampling = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "np"}
    texts = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "latents": torch.from_numpy(noise)[None]}
    own = pipelines[0] if image is None else pipelines[1]
    return 255 * own(**({} if image is None else {"image": image}), **texts, **shape, **sampling).frames[0]


def held(found, expected):
    """The same to one grey level, of a video in which there is something to see."""
    assert found.shape == expected.shape and found.dtype == np.uint8
    assert expected.std() > 5 and (expected % 255 != 0).mean() > 0.5
    assert abs(found - expected).max() <= 1.0


def noise_for(seed):
    return np.random.default_rng(seed).standard_normal(LATENT, np.float32)


def change(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.mark.parametrize("image", [None, picture(0, 64, 64), picture(1, 90, 50)], ids=["text", "64", "90x50"])
def test_one_bundle_gives_both_pipelines_frames(pipelines, folder, bundle, generated, image):
    """With ONNX Runtime and with PyTorch, which leaves out what is only for a picture."""
    noise = noise_for(0)
    expected = upstream(pipelines, image, noise)
    held(generated(bundle, image, noise), expected)
    held(generated(bundle, image, noise, "--backend", "torch", "--weights", folder), expected)


def test_without_graphs(folder, bundle, generated, command, tmp_path):
    """What PyTorch runs; and a base with a picture encoder, which takes concepts and no first picture."""
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    clip = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    with_clip = tmp_path / "with-clip"
    shutil.copytree(folder, with_clip)
    CLIPVisionModelWithProjection(clip).save_pretrained(with_clip / "image_encoder")
    image, noise = picture(2, 64, 64), noise_for(1)
    without, known = (generated(bundle, given, noise).astype(float) for given in (None, image))
    for place, expected in ((folder, known), (with_clip, without)):  # whose new adapter shows nothing
        own = tmp_path / f"{place.name}-bundle"
        code, _, err = command("export", place, "--output", own, *SIZE, "--no-graphs", "--quiet")
        assert (code, err) == (0, "")
        torch_backend = ("--backend", "torch", "--weights", place)
        held(generated(own, None, noise, *torch_backend), without)
        held(generated(own, image, noise, *torch_backend), expected)


@pytest.mark.slow
@pytest.mark.parametrize("image", [None, picture(1, 90, 50)], ids=["text", "picture"])
def test_fewer_tokens_of_text(pipelines, folder, bundle, generated, command, tmp_path, taken_from, image):
    with taken_from(bundle, "encode_first", "decode_first", "decode"):
        args = ("--output", tmp_path / "short", *SIZE, "--text-tokens", 64)
        assert command("export", folder, *args, "--quiet")[0] == 0
    held(generated(tmp_path / "short", image, noise_for(2)), upstream(pipelines, image, noise_for(2)))


@pytest.mark.slow
def test_int8(folder, bundle, generated, command, tmp_path, taken_from):
    with taken_from(bundle, "text_encoder", "condition", "encode_first", "denoise", "decode_first", "decode"):
        code, _, err = command("export", folder, "--output", tmp_path / "int8", *SIZE, "--int8", "--quiet")
        assert code == 0, err
    for image in (None, picture(1, 90, 50)):
        near, exact = (generated(b, image, noise_for(3)).astype(float) for b in (tmp_path / "int8", bundle))
        assert 0 < abs(near - exact).mean() < 3


@pytest.mark.slow
def test_tiles(folder, generated, command, tmp_path):
    """Of a frame that is larger than one: both backends alike, and nearly what the whole frame gives."""
    size, noise = ("--size", "128x64", "--frames", FRAMES), noise_for(4)
    noise = np.concatenate((noise, noise_for(5)), axis=3)
    for name, more in (("whole", ("--no-graphs",)), ("tiles", ("--tile", "64x64"))):
        code, _, err = command("export", folder, "--output", tmp_path / name, *size, *more, "--quiet")
        assert code == 0, err
    on_torch = ("--backend", "torch", "--weights", folder)
    found = generated(tmp_path / "tiles", picture(1, 90, 50), noise)
    held(generated(tmp_path / "tiles", picture(1, 90, 50), noise, *on_torch), found.astype(float))
    whole = generated(tmp_path / "whole", picture(1, 90, 50), noise, *on_torch)
    assert found.shape == whole.shape and abs(found - whole.astype(float)).mean() < 0.2 * whole.std()


def test_what_the_bundle_is(folder, bundle, command):
    from conceptmaster.runtime.bundle_format.manifest import load

    manifest = load(bundle)
    names = {"text_encoder", "condition", "denoise", "encode_first", "decode_first", "decode"}
    assert set(manifest.graphs) == names
    assert (manifest.format, manifest.concepts, manifest.fps) == (5, 1, 24.0)
    d = manifest.defaults
    assert (d.solver, d.shift, d.steps, d.guidance) == ("unipc", 3.0, 50, 5.0)  # the file's own shift
    assert manifest.graphs["denoise"].input("given").shape == (1, 1 + LATENT[0], 1, *LATENT[2:])
    code, out, _ = command("inspect", bundle)
    assert code == 0 and "0 to 1, as frame 0 (× 1); without one a video of text alone" in out
    code, out, err = command("verify", bundle, "--source", folder)
    assert (code, err) == (0, "") and out.count("ok") == len(names)


def test_a_preview_is_of_the_first_frame_that_is_made(bundle, monkeypatch):
    """Not of the picture, which is no news."""
    from conceptmaster import Concept, Pipeline

    seen = []
    with Pipeline.from_bundle(bundle, threads=1) as pipeline:
        decode = pipeline._decode
        monkeypatch.setattr(pipeline, "_decode", lambda x, *more: seen.append(x) or decode(x, *more))
        for concepts in ((), (Concept("the start", picture(0, 64, 64)),)):
            pipeline(PROMPT, concepts, steps=1, callback=lambda *step: step[2]().shape == (SIDE, SIDE, 3))
            estimate, made = seen
            np.testing.assert_allclose(estimate[:, 0], made[:, len(concepts)], atol=1e-5)  # of a single step
            seen.clear()


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("model_index.json", {"expand_timesteps": False}, "is the VAE of Wan2.2's TI2V-5B"),
        ("model_index.json", {"expand_timesteps": ...}, "is the VAE of Wan2.2's TI2V-5B"),
        ("model_index.json", {"expand_timesteps": "yes"}, "must be true or false"),
        ("vae/config.json", {"is_residual": "no"}, "is_residual must be true or false"),
        ("vae/config.json", {"is_residual": False}, "the weights do not fit AutoencoderKLWan"),
        ("vae/config.json", {"patch_size": None}, "in_channels must be 3 for this patch_size"),
        ("vae/config.json", {"patch_size": 4}, "in_channels must be 48"),
        ("vae/config.json", {"out_channels": 3}, "out_channels must be 12"),
        ("vae/config.json", {"z_dim": 48}, "48 latent channels, which must equal the transformer's 4"),
        ("vae/config.json", {"scale_factor_spatial": 8}, "must be 16 for these dim_mult and patch"),
        ("vae/config.json", {"decoder_base_dim": "x"}, "decoder_base_dim"),
        ("transformer/config.json", {"in_channels": 16}, "must equal transformer.in_channels (16)"),
        ("transformer/config.json", {"image_dim": 16, "added_kv_proj_dim": 24}, "without an image_dim"),
        ("transformer/config.json", {"in_channels": 12, "out_channels": 4}, "must equal transformer.in"),
        ("model_index.json", {"boundary_ratio": 0.9}, "boundary_ratio"),
        ("transformer/config.json", {"patch_size": [2, 2, 2]}, "patches of one latent frame"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(folder, command, tmp_path, path, changes, message):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    change(own / path, **changes)
    code, out, err = command("export", own, "--output", tmp_path / "out", *SIZE, "--no-graphs")
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err


def test_the_release_s_own_video(folder, command, tmp_path):
    """Where none is asked for; of one frame, which leaves none to make, text alone."""
    from conceptmaster.engine.checkpoints.source import open_source
    from conceptmaster.runtime.bundle_format.manifest import load

    config = open_source(folder).model.config
    assert (config.frames, config.width, config.height, config.fps) == (121, 1280, 704, 24.0)
    size = ("--frames", 1, "--size", "64x64")
    code, _, err = command("export", folder, "--output", tmp_path / "one", *size, "--no-graphs", "--quiet")
    assert (code, err) == (0, "")
    manifest = load(tmp_path / "one")
    assert (manifest.conditioning, manifest.concepts, manifest.format) == (None, 0, 3)


def test_a_small_video_s_step_is_computed_alike():
    """As an export needs it whose weights stay on disk: see `verify.check_small`."""
    import dataclasses

    from conceptmaster.engine.checkpoints.source import random_source
    from conceptmaster.engine.presets import preset
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.onnx_graphs.trace import trace
    from conceptmaster.export.onnx_graphs.weights_16bit import weight_readers
    from conceptmaster.export.verify import _computes, small_video

    config = preset("tiny")
    concept = dataclasses.replace(config.concept, injection="none", given="clean", max_concepts=1)
    transformer = dataclasses.replace(config.transformer, num_layers=1)
    config = dataclasses.replace(config, concept=concept, transformer=transformer, frames=17, width=64)
    source, found = random_source(config), []
    for video in (config, small_video(config)):
        specs = graph_specs(source.model, source.vae, config=video)
        (spec,) = (spec for spec in specs if spec.name == "denoise")
        readers = weight_readers(spec.module)
        found.append(_computes(trace(spec, readers)[0], readers))
    assert found[0] == found[1] and len(found[0]) > 50
