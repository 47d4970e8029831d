"""Bases of two experts, as Wan2.2's A14B: their bundles' videos against diffusers' pipelines, their
errors."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

PROMPT, NEGATIVE = "a red ball &amp; two\n quick cats  run up", "the rain"
SIDE, FRAMES, STEPS = 32, 9, 5
SIZE = ("--size", f"{SIDE}x{SIDE}", "--frames", FRAMES)
LATENT = (4, 3, 4, 4)
GUIDANCE = (7.0, 3.0)
"""Of the experts for high and for low noise; 4 of the 5 steps of shift 3 are above 0.5 and 0.6."""
EXPERTS = {"condition", "denoise", "condition_2", "denoise_2"}


def expert(wan_parts, seed, **changes):
    """A transformer of `wan_parts` with weights of its own, whose text and pictures show in the pixels."""
    import diffusers

    plain = {k: v for k, v in wan_parts()["transformer"].config.items() if not k.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = diffusers.WanTransformer3DModel(**plain | changes)
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, mean=0.0, std=0.3)
        torch.nn.init.normal_(transformer.patch_embedding.weight, std=0.6)
        for block in transformer.blocks:
            torch.nn.init.normal_(block.attn2.to_v.weight, std=4.0)
    return transformer.eval()


@pytest.fixture(scope="module")
def bases(wan_parts, tmp_path_factory):
    """Text and image to video: each a pipeline, and the folder where it saved itself. Not to be changed."""
    from diffusers import WanImageToVideoPipeline, WanPipeline
    from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v

    made = {}
    with pytest.MonkeyPatch.context() as patch:
        # the one for images needs ftfy, which leaves these prompts as they are
        patch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)
        for name, kind, boundary, changes in (
            ("t2v", WanPipeline, 0.5, {}),
            ("i2v", WanImageToVideoPipeline, 0.6, {"in_channels": 12}),
        ):
            parts = wan_parts()
            parts |= {"transformer": expert(wan_parts, 5, **changes)}
            parts |= {"transformer_2": expert(wan_parts, 2, **changes), "boundary_ratio": boundary}
            pipeline = kind(**parts)
            pipeline.set_progress_bar_config(disable=True)
            folder = tmp_path_factory.mktemp("pipelines") / f"tiny-{name}"
            pipeline.save_pretrained(folder, safe_serialization=True)
            made[name] = pipeline, folder
        yield made


@pytest.fixture(scope="module")
def bundles(bases, tmp_path_factory):
    """The bundles of `bases`, that of image to video without graphs. Not to be changed."""
    from conceptmaster.cli import main

    made = {}
    for name, more in (("t2v", ()), ("i2v", ("--no-graphs",))):
        made[name] = tmp_path_factory.mktemp("bundles") / name
        options = ("--output", str(made[name]), *map(str, SIZE), "--quiet", *more)
        assert main(["export", str(bases[name][1]), *options]) == 0
    return made


@pytest.fixture(scope="module")
def graphs(bases, bundles, tmp_path_factory, taken_from):
    """The bundle of image to video with its graphs, those that are others than of text to video."""
    from conceptmaster.cli import main

    bundle = tmp_path_factory.mktemp("bundles") / "i2v"
    with taken_from(bundles["t2v"], "text_encoder", "decode_first", "decode"):
        options = ("--output", str(bundle), *map(str, SIZE), "--quiet")
        assert main(["export", str(bases["i2v"][1]), *options]) == 0
    return bundle


@pytest.fixture
def generated(command, tmp_path):
    """`generated(bundle, pictures, noise, …)`: the frames that the command line writes."""

    def call(bundle, pictures, noise, *more, guidance=GUIDANCE):
        np.save(tmp_path / "noise.npy", noise)
        request = ["--prompt", PROMPT, "--negative", NEGATIVE, "--steps", STEPS, "--threads", 1]
        request += ["--guidance", guidance[0]]
        request += [] if guidance[1] is None else ["--guidance-2", guidance[1]]
        for i, image in enumerate(pictures):
            image.save(tmp_path / f"{i}.png")
            request += ["--concept", f"thing {i}", tmp_path / f"{i}.png"]
        files = ("--noise", tmp_path / "noise.npy", "--output", tmp_path / "video.npy", "--quiet")
        code, _, err = command("generate", "--bundle", bundle, *request, *files, *more)
        assert code == 0, err
        return np.load(tmp_path / "video.npy")

    return call


def upstream(pipeline, noise, guidance=GUIDANCE, **more):
    """The pipeline's frames in 0..255, [F,height,width,3]."""
    shape = {"height": SIDE, "width": SIDE, "num_frames": FRAMES}
    scales = {"guidance_scale": guidance[0], "guidance_scale_2": guidance[1]}
    sampling = {"num_inference_steps": STEPS, "output_type": "np", **scales}
    latents = torch.from_numpy(noise)[None]
    texts = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    return 255 * pipeline(latents=latents, **texts, **shape, **sampling, **more).frames[0]


def picture(seed):
    """Smooth colours."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def noise_for(seed):
    return np.random.default_rng(seed).standard_normal(LATENT, np.float32)


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


# Parity.


def test_the_bundle_gives_the_pipeline_s_frames(bases, bundles, generated):
    noise = noise_for(0)
    expected = upstream(bases["t2v"][0], noise)
    held(generated(bundles["t2v"], [], noise), expected)
    for other in ((7.0, 7.0), (3.0, 3.0)):  # both scales show
        assert abs(generated(bundles["t2v"], [], noise, guidance=other) - expected).max() > 2


def test_the_boundary_is_met_by_euler_s_times_too(bases, bundles, generated, monkeypatch):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline, noise = bases["t2v"][0], noise_for(1)
    monkeypatch.setattr(pipeline, "scheduler", FlowMatchEulerDiscreteScheduler(shift=2.0))
    found = generated(bundles["t2v"], [], noise, "--solver", "euler", "--shift", 2)
    held(found, upstream(pipeline, noise))


@pytest.mark.parametrize("boundary", [0.9995, 0.001])
def test_a_boundary_that_no_step_reaches(bases, bundles, generated, tmp_path, boundary):
    from conceptmaster.runtime.bundle_format import manifest as manifests

    pipeline, noise = bases["t2v"][0], noise_for(2)
    real = pipeline.config.boundary_ratio
    pipeline.register_to_config(boundary_ratio=boundary)
    expected = upstream(pipeline, noise)
    pipeline.register_to_config(boundary_ratio=real)
    folder = shutil.copytree(bundles["t2v"], tmp_path / "other")
    manifest = manifests.load(folder)
    high, low = manifest.experts
    both = dataclasses.replace(high, boundary=boundary), low
    manifests.save(dataclasses.replace(manifest, experts=both), folder)
    held(generated(folder, [], noise), expected)


def first_and_last(pipeline, count, noise):
    """So many pictures of two, and the pipeline's frames of them."""
    images = [picture(0), picture(1)][:count]
    last = {"last_image": images[1]} if count > 1 else {}
    return images, upstream(pipeline, noise, image=images[0], **last)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_first_frame_and_a_last_one_give_the_pipeline_s_frames(bases, graphs, generated, command, count):
    images, expected = first_and_last(bases["i2v"][0], count, noise_for(3))
    held(generated(graphs, images, noise_for(3)), expected)
    code, out, err = command("verify", graphs, "--source", bases["i2v"][1])
    assert (code, err, out.count(" ok\n")) == (0, "", 9)


@pytest.mark.parametrize("count", [1, 2])
def test_they_do_on_the_torch_backend(bases, bundles, generated, count):
    images, expected = first_and_last(bases["i2v"][0], count, noise_for(3))
    weights = ("--backend", "torch", "--weights", bases["i2v"][1])
    held(generated(bundles["i2v"], images, noise_for(3), *weights), expected)
    other = generated(bundles["i2v"], [picture(2), *images[1:]], noise_for(3), *weights)
    assert abs(other - expected).max() > 3


@pytest.mark.parametrize("swapped", [False, True])
def test_the_torch_backend_gives_the_same_frames(bases, bundles, generated, monkeypatch, swapped):
    """Also where there is room for one expert alone, and with weights that stay on disk until then."""
    from conceptmaster.engine.checkpoints import lazy_weights
    from conceptmaster.runtime.backends.pytorch import backend, memory_plan

    noise, made = noise_for(4), []
    expected = generated(bundles["t2v"], [], noise).astype(np.float64)
    if swapped:
        monkeypatch.setattr(lazy_weights, "MIN_ELEMENTS", 64)
        plan, real = memory_plan.plan, backend.TorchBackend._make_ready

        def short(demand):
            """No memory holds both."""
            return plan(demand) | ({} if demand.swapped else {"peak": 1 << 60})

        def seen(self, graph):
            real(self, graph)
            made.append(set(self._modules) & EXPERTS)

        monkeypatch.setattr(memory_plan, "plan", short)
        monkeypatch.setattr(backend.TorchBackend, "_make_ready", seen)
    found = generated(bundles["t2v"], [], noise, "--backend", "torch", "--weights", bases["t2v"][1])
    held(found, expected)
    assert set(map(len, made)) <= {0, 2} and (not swapped or {"condition_2", "denoise_2"} in made)


def test_one_transformer_without_a_picture_encoder(wan_parts, generated, command, tmp_path, monkeypatch):
    """As diffusers has it: no boundary, and pictures that are frames alone."""
    from diffusers import WanImageToVideoPipeline
    from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v

    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)
    pipeline = WanImageToVideoPipeline(**wan_parts() | {"transformer": expert(wan_parts, 6, in_channels=12)})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "base", safe_serialization=True)
    assert command("export", tmp_path / "base", "--output", tmp_path / "one", *SIZE, "--no-graphs")[0] == 0
    weights = ("--backend", "torch", "--weights", tmp_path / "base")
    found = generated(tmp_path / "one", [picture(3)], noise_for(6), *weights, guidance=(4.0, None))
    held(found, upstream(pipeline, noise_for(6), guidance=(4.0, None), image=picture(3)))


def test_trained_concepts_are_of_both_experts(bases, wan_folder, generated, command, tmp_path):
    """Over a base with a CLIP beside it: silent without an adapter, or a concept."""
    from conceptmaster.engine.checkpoints.adapter import save_adapter
    from conceptmaster.engine.checkpoints.source import Choices, open_source

    pipeline, folder = bases["t2v"]
    base, noise = shutil.copytree(folder, tmp_path / "base"), noise_for(7)
    shutil.copytree(wan_folder / "image_encoder", base / "image_encoder")
    for name, place in (("both", base), ("one", wan_folder)):
        model = open_source(place, Choices((SIDE, SIDE), FRAMES)).model
        for transformer in model.experts().values():
            for block in transformer.blocks:
                torch.nn.init.normal_(block.injector.to_out.weight, std=3.0)
        save_adapter(model, tmp_path / f"{name}.safetensors")
    export = ("export", base, *SIZE, "--no-graphs", "--output")
    both = ("--adapter", tmp_path / "both.safetensors")
    assert command(*export, tmp_path / "new")[0] == command(*export, tmp_path / "trained", *both)[0] == 0
    one = command(*export, tmp_path / "half", "--adapter", tmp_path / "one.safetensors")
    fails(one, "one.safetensors has no modules for transformer_2")
    weights = ("--backend", "torch", "--weights", base)
    expected = upstream(pipeline, noise)
    held(generated(tmp_path / "new", [picture(0)], noise, *weights), expected)
    held(generated(tmp_path / "trained", [], noise, *weights, *both), expected)
    shown = generated(tmp_path / "trained", [picture(0)], noise, *weights, *both)
    assert abs(shown - expected).max() > 3


# What the bundles are, and what the parts of the project make of them.


def test_what_the_bundles_are(bases, bundles, command):
    from conceptmaster.runtime.bundle_format.manifest import load

    graphs = {"text_encoder", "decode_first", "decode"} | EXPERTS
    for name, boundary, scales, more, pictures in (
        ("t2v", 0.5, {"guidance": 4.0, "guidance_2": 3.0}, set(), 0),
        ("i2v", 0.6, {"guidance": 3.5, "guidance_2": 3.5}, {"encode_first", "encode"}, 2),
    ):
        manifest = load(bundles[name])
        d = manifest.defaults
        assert set(manifest.graphs) == graphs | more
        assert (manifest.format, manifest.concepts, manifest.fps) == (5, pictures, 16.0)
        assert [(e.name, e.boundary) for e in manifest.experts] == [
            ("transformer", boundary),
            ("transformer_2", 0.0),
        ]
        assert manifest.scales == scales
        assert (d.solver, d.steps, d.shift) == ("unipc", 40, 3.0)  # its scheduler's file says the shift
    code, out, err = command("verify", bundles["t2v"], "--source", bases["t2v"][1])
    assert (code, err, out.count(" ok\n")) == (0, "", 7)
    code, out, _ = command("inspect", bundles["t2v"])
    assert code == 0 and "transformer from noise 1 to 0.5, guidance 4; transformer_2 below, guidance 3" in out
    code, out, _ = command("inspect", bundles["i2v"])
    assert code == 0 and "pictures  1 to 2, as frame 0 (× 1), frame -1 (× 1)" in out


def test_pictures_that_are_missing_or_too_many(bases, bundles, command, tmp_path):
    picture(0).save(tmp_path / "a.png")
    request = ("--prompt", "a ball", "--output", tmp_path / "a.mp4")
    concepts = [part for i in range(3) for part in ("--concept", f"thing {i}", tmp_path / "a.png")]
    i2v = ("--bundle", bundles["i2v"], "--backend", "torch", "--weights", bases["i2v"][1], "--quiet")
    fails(command("generate", *i2v, *request), "out of pictures: give it a picture")
    fails(command("generate", *i2v, *request, *concepts), "takes at most 2")
    fails(command("generate", "--bundle", bundles["t2v"], *request, *concepts), "takes no concepts")


@pytest.mark.slow
def test_every_option_of_an_export(bases, bundles, generated, command, tmp_path):
    """In 8 bits, for short prompts, in tiles and without guidance: the frames of the same base."""
    noise = noise_for(5)
    expected = generated(bundles["t2v"], [], noise).astype(np.float64)
    options = {
        "short": ("--text-tokens", 24),
        "int8": ("--int8",),
        "none": ("--no-graphs",),
        "tiles": ("--tile", f"{SIDE}x{SIDE}"),
    }
    for name, given in options.items():
        code, _, err = command("export", bases["t2v"][1], "--output", tmp_path / name, *SIZE, *given)
        assert (code, err) == (0, "")
    held(generated(tmp_path / "short", [], noise), expected)
    held(generated(tmp_path / "tiles", [], noise), expected)
    weights = ("--backend", "torch", "--weights", bases["t2v"][1])
    held(generated(tmp_path / "none", [], noise, *weights), expected)
    assert abs(generated(tmp_path / "int8", [], noise) - expected).mean() < 10


def change(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.fixture
def own(bases, tmp_path):
    """The text-to-video folder, to be changed."""
    return shutil.copytree(bases["t2v"][1], tmp_path / "own")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"boundary_ratio": None}, "has a transformer_2, but no boundary_ratio in model_index.json says"),
        ({"boundary_ratio": ...}, "has a transformer_2, but no boundary_ratio"),
        ({"boundary_ratio": 0}, "must be a number between 0 and 1"),
        ({"boundary_ratio": 1.0}, "must be a number between 0 and 1"),
        ({"boundary_ratio": 875}, "must be a number between 0 and 1"),
        ({"boundary_ratio": "0.875"}, "must be a number between 0 and 1"),
        ({"boundary_ratio": float("nan")}, "is not JSON that is read"),
    ],
)
def test_a_boundary_that_cannot_be(own, command, tmp_path, index, message):
    change(own / "model_index.json", **index)
    fails(command("export", own, "--output", tmp_path / "bundle", *SIZE), message)
    assert not (tmp_path / "bundle").exists()


def test_experts_that_are_missing_or_do_not_fit(own, command, tmp_path):
    export = ("export", own, "--output", tmp_path / "bundle", *SIZE)
    change(own / "transformer_2" / "config.json", ffn_dim=64)
    fails(command(*export), "two experts must have one shape", "ffn_dim is 48 in transformer and 64 in")
    change(own / "transformer_2" / "config.json", ffn_dim=48)
    (own / "transformer_2").rename(tmp_path / "away")
    fails(command(*export), "has no transformer_2, the expert for low noise", "model_index.json names one")
    change(own / "model_index.json", transformer_2=[None, None])
    fails(command(*export), "has no transformer_2", "has boundary_ratio 0.5: one expert alone makes no video")


def test_defaults_that_are_given(own, command, tmp_path):
    from conceptmaster.runtime.bundle_format.manifest import load

    for name, given, scales, branches in (
        ("both", ("--guidance", 6), (6.0, 6.0), 2),
        ("each", ("--guidance", 6, "--guidance-2", 2), (6.0, 2.0), 2),
        ("second", ("--guidance-2", 2), (4.0, 2.0), 2),
        ("none", ("--guidance", 1), (1.0, 1.0), 1),
        ("one", ("--guidance", 1, "--guidance-2", 2), (1.0, 2.0), 2),
    ):
        code, _, err = command("export", own, "--output", tmp_path / name, *SIZE, *given, "--no-graphs")
        assert (code, err) == (0, "")
        manifest = load(tmp_path / name)
        assert (*manifest.scales.values(),) == scales and manifest.shapes.branches == branches
