"""Bases in diffusers' layout: what they are as a source, and their bundle's video against WanPipeline's."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

PROMPT, NEGATIVE = "a red ball &amp; two\n quick cats  run up", "the rain"
SIZE = ("--size", "64x64", "--frames", 9)
STEPS, GUIDANCE = 4, 5.0


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """`pipeline` as it saves itself: no picture encoder. Not to be changed."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-wan"
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def own(wan_folder, tmp_path):
    """A folder with a picture encoder, to be changed."""
    return shutil.copytree(wan_folder, tmp_path / "own")


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The bundle of `folder`."""
    from conceptmaster.cli import main

    bundle = tmp_path_factory.mktemp("bundles") / "alone"
    assert main(["export", str(folder), "--output", str(bundle), *map(str, SIZE), "--quiet"]) == 0
    return bundle


def fails(result, *words):
    """Wrong input: one line on standard error, nothing on standard output."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("conceptmaster: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def expected_frames(pipeline, noise):
    """WanPipeline's frames of PROMPT in 0..255, [F,height,width,3]."""
    frames = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(noise)[None],
        output_type="np",
    ).frames[0]
    return frames * 255


def generated_frames(command, bundle, noise, tmp_path, *options):
    """The frames that the command line writes, uint8 [F,height,width,3]."""
    np.save(tmp_path / "noise.npy", noise)
    request = ("--prompt", PROMPT, "--negative", NEGATIVE, "--steps", STEPS, "--threads", 1)
    files = ("--noise", tmp_path / "noise.npy", "--output", tmp_path / "video.npy", "--quiet")
    code, _, err = command("generate", "--bundle", bundle, *request, *files, *options)
    assert (code, err) == (0, "")
    return np.load(tmp_path / "video.npy")


def held(found, expected):
    """The same to one grey level, of a video in which there is something to see."""
    assert found.shape == expected.shape == (9, 64, 64, 3) and found.dtype == np.uint8
    assert expected.std() > 5 and (expected % 255 != 0).mean() > 0.5
    assert abs(found - expected).max() <= 1.0


def noise_for(seed):
    return np.random.default_rng(seed).standard_normal((4, 3, 8, 8), np.float32)


# Parity.


def test_the_bundle_gives_the_pipeline_s_frames(pipeline, alone, command, tmp_path):
    noise = noise_for(0)
    held(generated_frames(command, alone, noise, tmp_path), expected_frames(pipeline, noise))


def test_the_bundle_gives_the_pipeline_s_frames_with_euler(pipeline, alone, command, tmp_path, monkeypatch):
    from diffusers import FlowMatchEulerDiscreteScheduler

    monkeypatch.setattr(pipeline, "scheduler", FlowMatchEulerDiscreteScheduler(shift=2.0))
    noise = noise_for(1)
    found = generated_frames(command, alone, noise, tmp_path, "--solver", "euler", "--shift", 2)
    held(found, expected_frames(pipeline, noise))


@pytest.mark.slow
def test_a_new_adapter_is_invisible_and_a_trained_one_is_not(own, pipeline, command, tmp_path):
    from conceptmaster.engine.checkpoints.adapter import save_adapter
    from conceptmaster.engine.checkpoints.source import Choices, open_source

    model = open_source(own, Choices((64, 64), 9)).model
    for parameter in model.transformer.blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path / "adapter.safetensors")
    trained = ("--adapter", tmp_path / "adapter.safetensors")
    for name, options in (("new", ()), ("trained", trained)):
        code, _, err = command("export", own, "--output", tmp_path / name, *SIZE, *options)
        assert (code, err) == (0, "")
    code, out, _ = command("verify", tmp_path / "trained", "--source", own, *trained)
    assert code == 0 and out.count(" ok\n") == 8

    from PIL import Image

    Image.new("RGB", (16, 16), (200, 30, 60)).save(tmp_path / "ball.png")
    concept = ("--concept", "red ball", tmp_path / "ball.png")
    noise = noise_for(2)
    expected = expected_frames(pipeline, noise)
    for name in ("new", "trained"):
        held(generated_frames(command, tmp_path / name, noise, tmp_path), expected)
    held(generated_frames(command, tmp_path / "new", noise, tmp_path, *concept), expected)
    seen = generated_frames(command, tmp_path / "trained", noise, tmp_path, *concept)
    assert abs(seen - expected).mean() > 2


def test_prompts_become_the_pipeline_s_tokens(pipeline, alone):
    pytest.importorskip("ftfy")
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    from conceptmaster.runtime.tokenizer import Tokenizer, padded

    tokenizer = Tokenizer(alone / "tokenizer.json")
    for text in ("", "a ball", PROMPT, "  A  RED\tball\u3000rolls ", "1 &lt; 2 &amp;amp; 3", "¿Qué? 東京 🎈"):
        known = pipeline.tokenizer(
            prompt_clean(text), padding="max_length", max_length=512, truncation=True, return_tensors="np"
        )
        ids, mask = padded(tokenizer.encode(text, 512, "the text"), 512)
        assert (ids == known.input_ids).all() and (mask == known.attention_mask).all(), text


def test_what_a_bundle_of_a_base_alone_is(alone, command, tmp_path):
    from conceptmaster.runtime.bundle_format.manifest import load

    manifest = load(alone)
    assert set(manifest.graphs) == {"text_encoder", "condition", "denoise", "decode_first", "decode"}
    assert (manifest.name, manifest.concepts, manifest.fps) == ("tiny-wan", 0, 16.0)
    defaults = manifest.defaults
    assert (defaults.solver, defaults.shift, defaults.steps, defaults.guidance) == ("unipc", 3.0, 50, 5.0)
    (tmp_path / "ball.png").touch()
    concept = ("--concept", "ball", tmp_path / "ball.png")
    request = ("--prompt", "a ball", *concept, "--output", tmp_path / "a.mp4")
    fails(command("generate", "--bundle", alone, *request), "takes no concepts")
    code, out, _ = command("inspect", alone)
    assert code == 0 and "concepts  none: a base alone" in out


def test_verify_knows_the_size_of_a_base(alone, folder, command):
    code, out, err = command("verify", alone, "--source", folder)
    assert (code, err, out.count(" ok\n")) == (0, "", 5)


# As a source.


@torch.no_grad()
def test_a_source_takes_its_adapter(own, tmp_path):
    from conceptmaster.engine.checkpoints.adapter import adapter_keys, save_adapter
    from conceptmaster.engine.checkpoints.source import Choices, open_source

    first, again = (open_source(own, Choices((64, 64), 9)) for _ in range(2))
    state = {name: value.clone() for name, value in first.model.state_dict().items()}
    assert all(value.equal(again.model.state_dict()[name]) for name, value in state.items())
    keys = adapter_keys(first.model)
    for name, value in first.model.named_parameters():
        if name in keys:
            torch.nn.init.normal_(value)
    save_adapter(first.model, tmp_path / "adapter.safetensors")
    trained = open_source(own, Choices((64, 32), 5, tmp_path / "adapter.safetensors")).model
    assert trained.config.latent_shape == (4, 2, 4, 8)
    for name, value in trained.state_dict().items():
        assert value.equal(first.model.state_dict()[name] if name in keys else state[name]), name


def test_sizes_defaults_and_their_errors(own, command, tmp_path):
    from conceptmaster.engine.checkpoints.source import open_source

    assert open_source(own).model.config.latent_shape == (4, 21, 60, 104)  # what Wan makes
    output = ("--output", tmp_path / "new")
    fails(command("export", own, *output, "--size", "64x65"), "the nearest that works is 81 frames of 64x64")
    fails(command("export", own, *output, "--frames", 80), "is 81 frames of 832x480")
    fails(command("export", own, *output, "--size", "big"), "'big' is no size")
    fails(command("export", own, *output, *SIZE, "--guidance", -1), "guidance: 0 to")
    fails(command("export", "preset:tiny", *output, *SIZE), "is no base")
    assert not (tmp_path / "new").exists()


def test_what_a_base_cannot_be(own, command, tmp_path, wan_folder):
    from conceptmaster.engine.checkpoints.adapter import save_adapter
    from conceptmaster.engine.model import ConceptMaster
    from conceptmaster.engine.presets import preset

    output = ("--output", tmp_path / "new", *SIZE)
    adapter = tmp_path / "adapter.safetensors"
    save_adapter(ConceptMaster(preset("tiny")), adapter)
    result = command("export", own, *output, "--adapter", adapter)
    fails(result, "adapter for another base", "text_dim is 16, not 24")
    shutil.rmtree(own / "image_encoder")
    fails(command("export", own, *output, "--adapter", adapter), "has no image_encoder/")
    fails(command("export", own, *output, "--adapter", tmp_path / "none"), "no weights file")
    fails(command("export", own, *output, "--revision", "main"), "a revision is one of the Hugging Face Hub")
    for place, content, words in (
        ("transformer/config.json", "{", ["transformer/config.json", "not JSON"]),
        ("scheduler/scheduler_config.json", "{}", ["the scheduler must be"]),
        ("tokenizer/tokenizer.json", None, ["tokenizer.json is missing"]),
        ("vae/diffusion_pytorch_model.safetensors", "x", ["not a readable safetensors file"]),
        ("text_encoder/model.safetensors", None, ["has no safetensors"]),
    ):
        (own / place).unlink()
        if content is not None:
            (own / place).write_text(content)
        fails(command("export", own, *output), *words)
        shutil.copy(wan_folder / place, own / place)
    values = json.loads((own / "text_encoder" / "config.json").read_text())
    (own / "text_encoder" / "config.json").write_text(json.dumps(values | {"feed_forward_proj": "magic-b-c"}))
    fails(command("export", own, *output), "its configuration cannot be built")
    torch.save({}, tmp_path / "wan.pth")
    fails(command("export", tmp_path / "wan.pth", "--output", tmp_path / "new"), "conceptmaster convert")
    assert not (tmp_path / "new").exists()


def test_names_of_the_hub(command, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    fails(command("export", "someone/wan", "--output", tmp_path / "new"), "someone/wan is no folder", "Hub")
