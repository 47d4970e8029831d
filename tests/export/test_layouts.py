"""A base in single files of scaled fp8, from the command line: its bundle, and how its weights are found."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

SIZE = ("--size", "64x64", "--frames", 9, "--quiet")


@pytest.mark.slow
def test_scaled_fp8_gives_the_frames_of_the_product_in_float16(command, tmp_path):
    from safetensors.torch import load_file, save_file

    from conceptmaster.benchmarks import layouts, random_base
    from conceptmaster.engine.concept_config import ConceptConfig
    from conceptmaster.engine.presets import preset

    config = preset("wan2.1-1.3b")
    sizes = {"num_attention_heads": 1, "text_dim": 24, "freq_dim": 16, "ffn_dim": 64, "num_layers": 2}
    text = {"vocab_size": 320, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    config = dataclasses.replace(
        config,
        transformer=dataclasses.replace(config.transformer, **sizes),
        concept=ConceptConfig(injection="none"),
        image_encoder={},
        text_encoder=config.text_encoder | text,
        vae=config.vae | {"base_dim": 16, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1},
    )
    single, plain = tmp_path / "single", tmp_path / "plain"
    random_base.write_base(config, single, layout="comfyui", bits="fp8-scaled")
    random_base.write_base(config, plain)
    files = {
        "transformer": next((single / "diffusion_models").iterdir()),
        "text-encoder": next((single / "text_encoders").iterdir()),
        "vae": next((single / "vae").iterdir()),
    }
    options = [word for part, file in files.items() for word in (f"--{part}", file)]
    for part, rename in (("transformer", lambda n: "model.diffusion_model." + layouts.wan_transformer(n)),
                         ("text_encoder", str)):  # fmt: skip
        tensors = load_file(files[part.replace("_", "-")])
        for file in (plain / part).glob("*.safetensors"):
            whole = load_file(file)
            for name in whole:
                value = tensors[rename(name)]
                scale = tensors.get(rename(name).removesuffix("weight") + "scale_weight")
                whole[name] = value if scale is None else (value.float() * scale).half()
            save_file(whole, file)
    tokenizer = ("--tokenizer", single / "tokenizer.json")
    code, _, err = command("export", *options, *tokenizer, "--output", tmp_path / "a", *SIZE)
    assert (code, err) == (0, "")
    assert command("export", plain, "--output", tmp_path / "b", *SIZE)[0] == 0
    half = sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    assert half == pytest.approx(sum(file.stat().st_size for file in (tmp_path / "b").iterdir()), rel=0.01)

    def frames(*given):
        path = tmp_path / "video.npy"
        path.unlink(missing_ok=True)
        how = ("--prompt", "a red ball", "--steps", 2, "--shift", 3, "--threads", 1)
        code, _, err = command("generate", *how, "--quiet", "--output", path, *given)
        assert (code, err) == (0, "")
        return np.load(path).astype(int)

    expected = frames("--bundle", tmp_path / "b")
    found = frames("--bundle", tmp_path / "a")
    assert expected.std() > 5 and np.array_equal(found, expected)
    for given in (options, ("--weights", single)):
        torch_frames = frames("--bundle", tmp_path / "a", "--backend", "torch", *given)
        assert abs(torch_frames - expected).max() <= 1
    for given in (("--source", single), options):
        code, out, err = command("verify", tmp_path / "a", *given, "--quiet")
        assert code == 0 and out.count(" ok\n") == 5, err
    code, out, _ = command("inspect", tmp_path / "a")
    assert code == 0 and "source    wan2.1-1.3b, 4 files" in out
    shutil.copy(next((plain / "vae").glob("*.safetensors")), tmp_path / "other.safetensors")
    other = [*options[:-1], tmp_path / "other.safetensors"]
    code, out, err = command("verify", tmp_path / "a", *other)
    assert (code, out) == (2, "")
    assert "was not part of it" in err or "recorded is" in err
