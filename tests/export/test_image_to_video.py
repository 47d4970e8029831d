"""Image-to-video bases and SkyReels-A2: their bundles' videos against diffusers' pipeline, their errors."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest

from conceptmaster.errors import WeightsError

torch = pytest.importorskip("torch")

PROMPT, NEGATIVE = "a red ball &amp; two\n quick cats  run up", "the rain"
SIDE, FRAMES, STEPS, GUIDANCE = 64, 17, 3, 5.0
SIZE = ("--size", f"{SIDE}x{SIDE}", "--frames", FRAMES)
LATENT = (4, 5, 8, 8)
PROCESSOR = "image_processor/preprocessor_config.json"


def picture(seed, width, height):
    """Smooth colours, so that no two ways of scaling agree by chance."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def patched():
    """A monkeypatch for the module."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def saved(image_to_video_parts, tmp_path_factory, patched):
    """`saved(name, positions)`: a pipeline, and the folder where it saved itself."""

    def build(name, positions=None):
        from diffusers import WanImageToVideoPipeline
        from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v

        # the one for images needs ftfy, which leaves these prompts as they are
        patched.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)
        pipeline = WanImageToVideoPipeline(**image_to_video_parts(positions))
        pipeline.set_progress_bar_config(disable=True)
        folder = tmp_path_factory.mktemp("pipelines") / name
        pipeline.save_pretrained(folder, safe_serialization=True)
        return pipeline, folder

    return build


@pytest.fixture(scope="module")
def first(saved):
    """Of a first frame. Not to be changed."""
    return saved("tiny-i2v")


@pytest.fixture(scope="module")
def a2(saved):
    """SkyReels-A2's layout: its transformer is a class of its own, and its program sets the shift."""
    from diffusers import UniPCMultistepScheduler

    pipeline, folder = saved("tiny-a2")
    change(folder / "transformer" / "config.json", _class_name="A2Model")
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=8)
    return pipeline, folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, taken_from):
    """`exported(folder)`: its bundle. All folders have the same text encoder and VAE, whose graphs are traced
    for the first alone."""
    from conceptmaster.cli import main

    shared = ("text_encoder", "encode_first", "encode", "decode_first", "decode")
    made = []

    def build(folder):
        bundle = tmp_path_factory.mktemp("bundles") / folder.name
        with taken_from(made[0], *shared) if made else contextlib.nullcontext():
            assert main(["export", str(folder), "--output", str(bundle), *map(str, SIZE), "--quiet"]) == 0
        made.append(bundle)
        return bundle

    return build


@pytest.fixture(scope="module")
def first_bundle(first, exported):
    """The bundle of `first`."""
    return exported(first[1])


@pytest.fixture(scope="module")
def a2_bundle(a2, exported):
    """The bundle of `a2`."""
    return exported(a2[1])


def change(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def upstream(pipeline, noise, image, guidance=GUIDANCE, **more):
    """The pipeline's frames in 0..255, [F,height,width,3]."""
    shape = {"height": SIDE, "width": SIDE, "num_frames": FRAMES}
    sampling = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "np"}
    latents = torch.from_numpy(noise)[None]
    texts = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    return 255 * pipeline(image=image, latents=latents, **texts, **shape, **sampling, **more).frames[0]


def held(found, expected):
    """The same to one grey level, of a video in which there is something to see."""
    assert found.shape == expected.shape and found.dtype == np.uint8
    assert expected.std() > 5 and (expected % 255 != 0).mean() > 0.5
    assert abs(found - expected).max() <= 1.0


def fails(result, *words):
    """Wrong input: one line on standard error, nothing on standard output."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("conceptmaster: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def noise_for(seed):
    return np.random.default_rng(seed).standard_normal(LATENT, np.float32)


# Wan2.1's.


@pytest.mark.parametrize("size", [(64, 64), (90, 50)])  # diffusers stretches what has another shape
def test_a_first_frame_gives_the_pipeline_s_frames(first, first_bundle, generated, size):
    image, noise = picture(0, *size), noise_for(0)
    expected = upstream(first[0], noise, image)
    held(generated(first_bundle, [image], noise), expected)
    held(generated(first_bundle, [image], noise, "--backend", "torch", "--weights", first[1]), expected)
    other = generated(first_bundle, [picture(1, *size)], noise)
    assert abs(other - expected).max() > 5


@pytest.mark.slow
def test_a_first_and_a_last_frame_give_the_pipeline_s_frames(saved, exported, generated):
    pipeline, folder = saved("tiny-flf2v", positions=10)
    images, noise = [picture(0, 80, 60), picture(1, 64, 64)], noise_for(1)
    expected = upstream(pipeline, noise, images[0], last_image=images[1])
    bundle = exported(folder)
    held(generated(bundle, images, noise), expected)
    held(generated(bundle, images, noise, "--backend", "torch", "--weights", folder), expected)


@pytest.mark.slow
def test_without_guidance(first, command, generated, tmp_path):
    pipeline, folder = first
    code, _, err = command("export", folder, "--output", tmp_path / "one", *SIZE, "--branches", 1)
    assert (code, err) == (0, "")
    image, noise = picture(2, 64, 64), noise_for(2)
    held(generated(tmp_path / "one", [image], noise), upstream(pipeline, noise, image, guidance=1.0))


# SkyReels-A2, by its published recipe.


def padded(image, height, width):
    """SkyReels-A2's `_crop_and_resize_pad`: white beside or above, then scaled."""
    from PIL import Image

    pixels = np.array(image)
    own_height, own_width, _ = pixels.shape
    if own_height / own_width < height / width:
        pad = int((height / width * own_width - own_height) / 2.0)
        pixels = np.pad(pixels, ((pad, pad), (0, 0), (0, 0)), constant_values=255)
    else:
        pad = int((width / height * own_height - own_width) / 2.0)
        pixels = np.pad(pixels, ((0, 0), (pad, pad), (0, 0)), constant_values=255)
    return Image.fromarray(pixels).resize((width, height))


def cut(image, height, width):
    """SkyReels-A2's `_crop_and_resize`: the middle, then scaled."""
    from PIL import Image

    pixels = np.array(image)
    own_height, own_width, _ = pixels.shape
    if own_height / own_width < height / width:
        kept = int(own_height / height * width)
        left = (own_width - kept) // 2
        pixels = pixels[:, left : left + kept]
    else:
        kept = int(own_width / width * height)
        top = (own_height - kept) // 2
        pixels = pixels[top : top + kept]
    return Image.fromarray(pixels).resize((width, height))


def condition_for(pipeline, images):
    """The channels beside the noise: A2Pipeline's, but of the latents' mean. One reference, which A2Pipeline
    cannot do, as its rule for two and three continues."""
    vae, count = pipeline.vae, len(images)
    frames = [
        pipeline.video_processor.preprocess(fit(image, SIDE, SIDE), height=SIDE, width=SIDE).unsqueeze(2)
        for image, fit in zip(images, (padded, padded, cut), strict=False)
    ]
    frames = [frames[0], *(frame for frame in frames[1:] for _ in range(4))]
    used = len(frames)
    video = torch.cat([*frames, torch.zeros(1, 3, FRAMES - used, SIDE, SIDE)], dim=2)
    mean, std = (torch.tensor(vae.config[f"latents_{n}"]).view(1, -1, 1, 1, 1) for n in ("mean", "std"))
    latents = (vae.encode(video).latent_dist.mode() - mean) / std
    mask = torch.ones(1, 1, FRAMES, *LATENT[2:])
    mask[:, :, 1:] = 0
    leading = torch.repeat_interleave(mask[:, :, :1], dim=2, repeats=4 * count)
    mask = torch.cat([leading, mask[:, :, used:]], dim=2)
    mask = mask.view(1, -1, 4, *LATENT[2:]).transpose(1, 2)
    return torch.cat([mask, latents], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
def test_references_give_the_recipe_s_frames(a2, a2_bundle, generated, monkeypatch, count):
    pipeline, _ = a2
    images, noise = [picture(0, 50, 80), picture(1, 97, 41), picture(2, 100, 70)][:count], noise_for(3)
    squares = [padded(image, 512, 512) for image in images]
    tokens = torch.cat([pipeline.encode_image(square) for square in squares], dim=1)
    condition = condition_for(pipeline, images)
    monkeypatch.setattr(pipeline, "encode_image", lambda *_: tokens)
    monkeypatch.setattr(pipeline, "prepare_latents", lambda *_: (torch.from_numpy(noise)[None], condition))
    expected = upstream(pipeline, noise, images[0])[4 * count :]
    held(generated(a2_bundle, images, noise), expected)


def test_the_torch_backend_gives_the_same_frames(a2, a2_bundle, generated):
    images, noise = [picture(0, 50, 80), picture(1, 97, 41)], noise_for(5)
    found = generated(a2_bundle, images, noise, "--backend", "torch", "--weights", a2[1])
    held(found, generated(a2_bundle, images, noise).astype(np.float64))


@torch.no_grad()
def test_given_frames_are_the_recipe_s_condition(a2, a2_bundle, assert_close):
    """The same for the condition alone, which is not seen through the network."""
    from conceptmaster.runtime import frame_conditioning
    from conceptmaster.runtime.backends import open_backend
    from conceptmaster.runtime.bundle_format.find import Bundle

    bundle = Bundle.open(a2_bundle)
    images = [picture(3, 61, 64), picture(4, 64, 61), picture(5, 30, 90)]
    frames = {}
    for index, image in enumerate(images):
        frames |= frame_conditioning.fitted(image, index, "a", bundle.manifest)
    found = frame_conditioning.channels(open_backend(bundle, "cpu", 1), frames, bundle.manifest)
    assert_close(found, condition_for(a2[0], images))


# What the bundles are, and what they refuse.


def test_what_the_bundles_are(first, first_bundle, a2, a2_bundle, command):
    from conceptmaster.export.triton_server.repository import pipeline_config
    from conceptmaster.runtime.bundle_format.manifest import load
    from conceptmaster.runtime.bundle_format.pictured import FramePlacement
    from conceptmaster.runtime.frame_conditioning import lengths

    graphs = {"text_encoder", "image_encoder", "condition", "denoise", "encode_first", "encode"}
    for bundle, most, defaults, fps in (
        (first_bundle, 1, ("unipc", 3.0, 50, 5.0), 16.0),
        (a2_bundle, 3, ("unipc", 8.0, 50, 5.0), 15.0),
    ):
        manifest = load(bundle)
        d = manifest.defaults
        assert set(manifest.graphs) == graphs | {"decode_first", "decode"}
        assert (manifest.concepts, manifest.fps, manifest.format) == (most, fps, 3)
        assert not manifest.reads_labels  # so that none is warned of
        dropped = (4, 12) if most == 3 else (0, 0)
        assert lengths(manifest) == (FRAMES - dropped[1], FRAMES - dropped[0])
        assert ("dims: [-1," in pipeline_config(manifest).partition("FRAMES")[2]) == (most == 3)
        assert (d.solver, d.shift, d.steps, d.guidance) == defaults
    assert load(first_bundle).conditioning.placements == (FramePlacement(0, 1, "stretched"),)
    places = (FramePlacement(0, 1, "padded"), FramePlacement(1, 4, "padded"), FramePlacement(5, 4, "cut"))
    assert load(a2_bundle).conditioning.placements == places
    code, out, _ = command("inspect", a2_bundle)
    assert code == 0 and "1 to 3, as frame 0 (× 1), frame 1 (× 4), frame 5 (× 4); 4 frames are left" in out
    for (_, folder), bundle in ((first, first_bundle), (a2, a2_bundle)):
        code, out, err = command("verify", bundle, "--source", folder)
        assert (code, err, out.count(" ok\n")) == (0, "", 8)
    fails(command("verify", first_bundle, "--source", a2[1]), "are of another model than the bundle")


def test_pictures_that_are_missing_or_too_many(first_bundle, a2_bundle, command, tmp_path):
    picture(0, 8, 8).save(tmp_path / "a.png")
    request = ("--prompt", "a ball", "--output", tmp_path / "a.mp4")
    concepts = [part for i in range(4) for part in ("--concept", f"thing {i}", tmp_path / "a.png")]
    for bundle, most in ((first_bundle, 1), (a2_bundle, 3)):
        result = command("generate", "--bundle", bundle, *request)
        fails(result, "makes videos out of pictures: give it a picture", "--concept LABEL IMAGE")
        result = command("generate", "--bundle", bundle, *request, *concepts)
        fails(result, f"4 concepts, but the bundle {bundle.name!r} takes at most {most}")
    result = command("generate", "--bundle", a2_bundle, *request, "--concept", "x", tmp_path / "no.png")
    fails(result, "the picture of 'x'", "cannot be read")
    assert not (tmp_path / "a.mp4").exists()


def test_a_picture_whose_shape_is_lost_is_told(first_bundle, caplog):
    from conceptmaster.runtime.pipeline import Concept, Pipeline

    pipeline = Pipeline.from_bundle(first_bundle, threads=1)
    video = pipeline("a ball", [Concept("ball", picture(0, 80, 60))], steps=1)
    assert video.frames.shape == (FRAMES, SIDE, SIDE, 3)
    assert "80×60: it is stretched to the video's 64×64" in caplog.text


def test_previews_are_of_what_is_kept(a2_bundle):
    from conceptmaster.runtime.pipeline import Concept, Pipeline

    pipeline = Pipeline.from_bundle(a2_bundle, threads=1)
    seen = []
    concepts = [Concept("ball", picture(0, 64, 64)), Concept("cat", picture(1, 64, 64))]
    video = pipeline("a ball", concepts, steps=2, callback=lambda *args: seen.append(args[2]()))
    assert [frame.shape for frame in seen] == [(SIDE, SIDE, 3)] * 2
    assert video.frames.shape[0] == FRAMES - 8 and video.fps == 15.0


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("transformer/config.json", {"image_dim": 32}, "(16) must equal transformer.image_dim (32)"),
        ("transformer/config.json", {"added_kv_proj_dim": 16}, "the transformer's width (24)"),
        ("transformer/config.json", {"image_dim": None}, "added_kv_proj_dim (24) needs an image_dim"),
        ("transformer/config.json", {"in_channels": 16}, "in_channels must be 12 for this VAE"),
        ("transformer/config.json", {"pos_embed_seq_len": 514}, "(514) must equal the pictures' tokens (10)"),
        (PROCESSOR, {"size": {"shortest_edge": 32}}, "size must be {'shortest_edge': 16}"),
        (PROCESSOR, {"do_center_crop": False}, "do_center_crop must be True"),
        (PROCESSOR, {"image_mean": [0.5] * 3}, "image_mean must be CLIP's"),
        (PROCESSOR, {"resample": 2}, "resample must be 3, got 2"),
    ],
)
def test_configurations_that_cannot_be_honoured(first, command, tmp_path, path, changes, message):
    own = shutil.copytree(first[1], tmp_path / "own")
    change(own / path, **changes)
    fails(command("export", own, "--output", tmp_path / "new", *SIZE), message)


def test_folders_that_cannot_be_honoured(first, a2, command, tmp_path):
    from conceptmaster.engine.checkpoints.adapter import save_adapter
    from conceptmaster.engine.model import ConceptMaster
    from conceptmaster.engine.presets import preset

    output = ("--output", tmp_path / "new", *SIZE[:2])
    own = shutil.copytree(first[1], tmp_path / "own")
    shutil.rmtree(own / "image_encoder")
    fails(command("export", own, *output, "--frames", FRAMES), "has no image_encoder/")
    save_adapter(ConceptMaster(preset("tiny")), tmp_path / "adapter.safetensors")
    adapter = ("--adapter", tmp_path / "adapter.safetensors")
    fails(
        command("export", first[1], *output, "--frames", FRAMES, *adapter),
        "takes pictures itself: no adapter",
    )
    fails(command("export", first[1], *output, "--frames", FRAMES, "--branches", 3), "of captions alone")
    fails(command("export", first[1], *output, "--frames", 1), "the nearest that works is 5 frames of 64x64")
    fails(command("export", a2[1], *output, "--frames", 9), "the nearest that works is 13 frames of 64x64")
    own = shutil.copytree(a2[1], tmp_path / "a2")
    change(own / "transformer" / "config.json", image_dim=None, added_kv_proj_dim=None)
    fails(
        command("export", own, *output, "--frames", FRAMES), "SkyReels-A2 has an image_dim, this one has none"
    )
    assert not (tmp_path / "new").exists()


def test_what_marks_skyreels_a2(first, tmp_path):
    from conceptmaster.engine.checkpoints.diffusers_folder import open_folder
    from conceptmaster.engine.checkpoints.wan import Sampling, read_config, read_sampling

    own = shutil.copytree(first[1], tmp_path / "own")

    def kind():
        concept = read_config(open_folder(own), "a", (SIDE, SIDE), FRAMES).concept
        return concept.given, concept.max_concepts

    assert kind() == ("first", 1) and read_sampling(open_folder(own)) == Sampling("unipc", 3.0)
    index = (own / "model_index.json").read_text()
    for changes in (
        {"_class_name": "A2Pipeline"},
        {"_class_name": "WanA2Pipeline"},
        {"transformer": ["transformer_a2", "A2Model"]},
    ):
        change(own / "model_index.json", **changes)
        assert kind() == ("references", 3) and read_sampling(open_folder(own)) == Sampling("unipc", 8.0)
        (own / "model_index.json").write_text(index)
    (own / "model_index.json").unlink()
    (own / "image_processor" / "preprocessor_config.json").unlink()
    assert kind() == ("first", 1)
    change(own / "transformer" / "config.json", _class_name="A2Model")
    assert kind() == ("references", 3)


def test_picture_encoders_with_a_prefix_and_a_projection(first, tmp_path):
    """As a CLIPVisionModelWithProjection saves it, and transformers once saved any."""
    from conceptmaster.engine.checkpoints.diffusers_folder import open_folder
    from conceptmaster.engine.checkpoints.safetensors_io import load, save
    from conceptmaster.engine.checkpoints.wan import load_base, read_config

    own = shutil.copytree(first[1], tmp_path / "own")
    path = own / "image_encoder" / "model.safetensors"
    state = load(path)[0]
    assert not any(name.startswith("vision_model.") for name in state)
    config = read_config(open_folder(own), "a", (SIDE, SIDE), FRAMES)
    prefixed = {f"vision_model.{name}": value for name, value in state.items()}
    save(path, prefixed | {"visual_projection.weight": torch.zeros(8, 16)})
    found = load_base(open_folder(own), config).image_encoder.model.state_dict()
    assert all(value.equal(found[name]) for name, value in state.items())
    del prefixed["vision_model.pre_layrnorm.bias"]
    save(path, prefixed | {"more": torch.zeros(1)})
    with pytest.raises(WeightsError) as error:
        load_base(open_folder(own), config)
    assert "1 missing: pre_layrnorm.bias" in str(error.value) and "1 unexpected: more" in str(error.value)
