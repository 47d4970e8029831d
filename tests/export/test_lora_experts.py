"""LoRAs of bases of two experts, as Wan2.2's A14B: a stack for each, as diffusers fuses them."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors.torch import save_file  # noqa: E402

from conceptmaster.engine.checkpoints.source import SECOND, Choices, loras_of, open_source  # noqa: E402

SIZE = ("--size", "64x64", "--frames", 9, "--quiet", "--no-graphs")
LAYERS = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_k")


@pytest.fixture(scope="module")
def pipeline(wan_parts):
    """With two transformers that differ. It is changed by the last test alone."""
    from diffusers import WanPipeline

    parts = wan_parts() | {"transformer_2": wan_parts(seed=1)["transformer"], "boundary_ratio": 0.5}
    return WanPipeline(**parts)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """`pipeline` as it saves itself, and beside it two LoRAs, high.safetensors and low.safetensors."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-a14b"
    pipeline.save_pretrained(folder, safe_serialization=True)
    g = torch.Generator().manual_seed(0)
    for name in ("high", "low"):
        tensors = {}
        for layer in LAYERS:
            tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, 24, generator=g)
            tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(24, 2, generator=g)
        save_file(tensors, folder.parent / f"{name}.safetensors")
    return folder


def files(folder, *names):
    return [folder.parent / f"{name}.safetensors" for name in names]


def test_one_stack_for_each(pipeline, folder, assert_close, caplog):
    high, low = files(folder, "high", "low")
    loras = loras_of([high, low], (0.5, -1.0)) + loras_of([low], (0.25,), False, SECOND)
    source = open_source(folder, Choices((64, 64), 9, loras=loras))
    assert not caplog.messages
    for expert, stack in (("transformer", ((high, 0.5), (low, -1.0))), ("transformer_2", ((low, 0.25),))):
        for file, scale in stack:
            second = expert == "transformer_2"
            pipeline.load_lora_weights(str(file), load_into_transformer_2=second)
            pipeline.fuse_lora(components=[expert], lora_scale=scale)
            pipeline.unload_lora_weights()
        found = source.model.experts()[expert].state_dict()
        for name, value in getattr(pipeline, expert).state_dict().items():
            assert_close(found[name], value)


def test_what_is_recorded_is_merged_again(folder, command, tmp_path):
    from conceptmaster.runtime.backends.pytorch.weights import open_weights
    from conceptmaster.runtime.bundle_format.find import Bundle

    high, low = files(folder, "high", "low")
    export = ("export", folder, "--output", tmp_path / "bundle", *SIZE)
    pair = ("--lora", high, "--lora-2", low, "--lora-2-scale", 0.5)
    code, _, err = command(*export, *pair)
    assert (code, err) == (0, "")
    bundle = Bundle.open(str(tmp_path / "bundle"))
    recorded = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["source"]["loras"]
    assert [entry.get("expert") for entry in recorded] == [None, SECOND]
    assert "LoRA high.safetensors × 1, LoRA low.safetensors × 0.5 for low noise" in str(
        bundle.manifest.source
    )
    given = loras_of([high], ()) + loras_of([low], (), False, SECOND)
    again = open_weights(bundle, folder, Choices(loras=given))
    once = open_source(
        folder, Choices((64, 64), 9, loras=loras_of([high], ()) + loras_of([low], (0.5,), False, SECOND))
    )
    for name, value in once.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    for wrong, words in (
        (loras_of([high], ()), "made with the LoRA 'low.safetensors' .*give it with --lora-2 FILE"),
        (loras_of([high], ()) + loras_of([low], (2.0,), False, SECOND), "at scale 0.5, not 2"),
    ):
        with pytest.raises(ValueError, match=words):
            open_weights(bundle, folder, Choices(loras=wrong))


def test_what_goes_to_one_expert_alone(folder, command, tmp_path, wan_parts):
    from diffusers import WanPipeline

    (high,) = files(folder, "high")
    export = ("export", folder, "--output", tmp_path / "bundle", *SIZE)
    for option, words in (
        ("--lora", "the expert for high noise alone gets a LoRA: --lora-2 is for the other one"),
        ("--lora-2", "the expert for low noise alone gets a LoRA: --lora is for the other one"),
    ):
        code, _, err = command(*export, option, high, "--overwrite")
        assert code == 0 and err.count("\n") == 1 and words in err
    code, _, err = command(*export, "--lora-2-scale", 1, "--overwrite")
    assert code == 2 and "a scale without a LoRA: --lora-2 FILE says which" in err
    one = tmp_path / "one"
    WanPipeline(**wan_parts()).save_pretrained(one, safe_serialization=True)
    code, _, err = command("export", one, "--output", tmp_path / "new", *SIZE, "--lora-2", high)
    assert code == 2 and "has one transformer: --lora-2 is for the second of two" in err
