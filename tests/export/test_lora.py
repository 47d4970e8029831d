"""A LoRA for few steps, merged at export: the frames of diffusers' pipeline with the same file fused."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

SIZE = ("--size", "64x64", "--frames", 9, "--quiet")
SCALE, STEPS, SHIFT = 0.7, 3, 5.0
LAYERS = ("attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")
PROMPT = "a red ball rolls to the left"


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """`pipeline` before it gets its LoRA, and in lora.safetensors beside it that LoRA."""
    pytest.importorskip("peft")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("pipelines") / "tiny-wan"
    pipeline.save_pretrained(folder, safe_serialization=True)
    g, tensors = torch.Generator().manual_seed(3), {}
    for block in range(2):
        for layer in LAYERS:
            name = f"blocks.{block}.{layer}"
            o, i = pipeline.transformer.get_submodule(name).weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(3, i, generator=g) * 0.3
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(o, 3, generator=g) * 0.3
    save_file(tensors, folder.parent / "lora.safetensors")
    return folder


def frames(pipeline, noise):
    """The pipeline's own without guidance, in 0..255."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    size = {"height": 64, "width": 64, "num_frames": 9}
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "np"}
    latents = torch.from_numpy(noise)[None]
    return pipeline(prompt=PROMPT, latents=latents, **size, **options).frames[0] * 255


def test_the_bundle_gives_the_frames_of_the_fused_pipeline(pipeline, folder, command, tmp_path):
    from conceptmaster.runtime.bundle_format.manifest import load

    file = folder.parent / "lora.safetensors"
    lora = ("--lora", file, "--lora-scale", SCALE)
    defaults = ("--solver", "euler", "--steps", STEPS, "--shift", SHIFT, "--guidance", 1)
    code, out, err = command("export", folder, "--output", tmp_path / "fast", *SIZE, *lora, *defaults)
    assert (code, err) == (0, "") and out.count(" ok\n") == 5
    manifest = load(tmp_path / "fast")
    given = manifest.defaults
    assert (given.solver, given.steps, given.shift, given.guidance) == ("euler", STEPS, SHIFT, 1.0)
    assert manifest.shapes.branches == 1  # no guidance, no second branch
    mask = manifest.graphs["condition"].input("text")
    assert mask.shape[0] == 1 and manifest.graphs["denoise"].input("text_keys").shape[1] == 1
    assert command("verify", tmp_path / "fast", "--source", folder, *lora)[0] == 0
    code, _, err = command("verify", tmp_path / "fast", "--source", folder)
    assert code == 2 and "made with the LoRA 'lora.safetensors'" in err and "with --lora FILE" in err
    code, _, err = command("verify", tmp_path / "fast", "--source", folder, *lora[:2], "--lora-scale", 0.1)
    assert code == 2 and f"at scale {SCALE:g}, not 0.1" in err

    noise = np.random.default_rng(0).standard_normal((4, 3, 8, 8), np.float32)
    np.save(tmp_path / "noise.npy", noise)
    request = ("--prompt", PROMPT, "--noise", tmp_path / "noise.npy", "--output", tmp_path / "video.npy")
    assert command("generate", "--bundle", tmp_path / "fast", *request, "--threads", 1, "--quiet")[0] == 0
    found = np.load(tmp_path / "video.npy")
    plain = frames(pipeline, noise)
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora(lora_scale=SCALE)
    expected = frames(pipeline, noise)
    assert abs(expected - plain).mean() > 2  # the LoRA shows
    assert abs(found - expected).max() <= 1.0


def test_loras_that_cannot_be_merged(folder, command, tmp_path):
    from safetensors.torch import save_file

    output = ("--output", tmp_path / "new", *SIZE)
    save_file({"something.else.lora_A.weight": torch.ones(1, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "pickled.pt").write_bytes(b"")
    for options, words in (
        (("--lora", tmp_path / "other.safetensors"), "matches nothing in the transformer"),
        (("--lora", tmp_path / "none.safetensors"), "no weights file at"),
        (("--lora", tmp_path / "pickled.pt"), "is a pickle"),
        (("--lora-scale", 0.5), "a scale without a LoRA"),
        (("--lora", folder.parent / "lora.safetensors", "--lora-scale", "nan"), "must be a finite number"),
        (("--steps", 0), "steps must be 1 to"),
        (("--shift", -1), "shift must be"),
    ):
        code, out, err = command("export", folder, *output, *options)
        assert (code, out) == (2, "") and err.count("\n") == 1 and words in err, err
    lora = ("--lora", tmp_path / "other.safetensors")
    code, _, err = command("export", "preset:tiny", "--output", tmp_path / "new", *lora)
    assert code == 2 and "matches nothing in the transformer" in err  # it is no base, and takes LoRAs, too
    assert not (tmp_path / "new").exists()


def test_a_part_is_recorded_and_merged_again(folder, command, tmp_path):
    from safetensors.torch import load_file, save_file

    from conceptmaster.engine.checkpoints.source import Choices, LoraFile
    from conceptmaster.runtime.backends.pytorch.weights import open_weights
    from conceptmaster.runtime.bundle_format.find import Bundle

    file, layer = tmp_path / "i2v.safetensors", "transformer.blocks.0.attn2.add_k_proj"
    rest = {f"{layer}.lora_A.weight": torch.ones(1, 24), f"{layer}.lora_B.weight": torch.ones(24, 1)}
    save_file(load_file(folder.parent / "lora.safetensors") | rest, file)
    export = ("export", folder, "--output", tmp_path / "part", "--no-graphs", *SIZE, "--lora", file)
    code, out, err = command(*export)
    assert (code, out, err.count("\n")) == (2, "", 1) and "--lora-partial merges the rest" in err
    code, _, err = command(*export, "--lora-partial")
    assert code == 0 and "2 keys are left out: transformer.blocks.0.attn2" in err
    bundle = Bundle.open(str(tmp_path / "part"))
    assert bundle.manifest.format == 5 and bundle.manifest.source.loras[0].partial
    assert command("inspect", tmp_path / "part")[1].count("LoRA i2v.safetensors × 1 in part") == 1
    given = Choices(loras=(LoraFile(file),))
    assert open_weights(bundle, folder, given).origin.loras[0][3]
    assert command(*export[:-2], "--lora", folder.parent / "lora.safetensors", "--overwrite")[0] == 0
    text = (tmp_path / "part" / "manifest.json").read_text()
    assert '"format": 3' in text and '"partial"' not in text
    code, _, err = command(*export[:-2], "--lora-partial", "--overwrite")
    assert code == 2 and "--lora-partial without a LoRA" in err
