"""A LoRA of an image-to-video model on a text-to-video one, and the other way round: what fits is merged."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.checkpoints.lora import merge_lora  # noqa: E402
from conceptmaster.engine.checkpoints.safetensors_io import save  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.errors import WeightsError  # noqa: E402

HERE = {"blocks.0.self_attn.q": "blocks.0.attn1.to_q", "blocks.1.cross_attn.k": "blocks.1.attn2.to_k"}
IMAGES = ("blocks.0.cross_attn.k_img", "blocks.1.cross_attn.v_img", "img_emb.proj.1")


def pairs(names, width=24, rank=2):
    g = torch.Generator().manual_seed(0)
    return {
        f"diffusion_model.{name}.{key}": torch.randn(shape, generator=g) * 0.3
        for name in names
        for key, shape in (("lora_down.weight", (rank, width)), ("lora_up.weight", (width, rank)))
    }


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("injection", ["none", "shared_query"])
def test_an_image_to_video_lora_on_text_to_video(tiny, randomise, injection, tmp_path, assert_close):
    """Also where a concept adapter has modules of the same names, which the LoRA is not for."""
    model, path = randomise(ConceptDiT(tiny(injection=injection))), tmp_path / "lora.safetensors"
    rest = pairs(IMAGES) | {"diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.ones(24)}
    tensors = pairs(HERE) | rest | {"lora_te_text.lora_down.weight": torch.ones(2, 2)}
    save(path, tensors)
    before = state_of(model)
    with pytest.raises(WeightsError, match=r"nothing for 8 of its keys: .*; --lora-partial merges the rest"):
        merge_lora(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = merge_lora(model, path, 0.5, partial=True)
    assert set(report.left_out) == {*rest, "lora_te_text.lora_down.weight"}
    assert "2 tensors changed, rank 2; 8 keys are left out: diffusion_model." in str(report)
    after = model.state_dict()
    for theirs, ours in HERE.items():
        pair = (
            tensors[f"diffusion_model.{theirs}.lora_up.weight"],
            tensors[f"diffusion_model.{theirs}.lora_down.weight"],
        )
        assert_close(after.pop(f"{ours}.weight"), before[f"{ours}.weight"] + 0.5 * pair[0] @ pair[1])
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_a_text_to_video_lora_on_image_to_video_fits_whole(tiny_base, randomise, tmp_path, assert_close):
    """diffusers fills up with zeros what the LoRA does not have."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    config = tiny_base("first")
    own = {"position_channels", "prediction"}
    fields = {k: v for k, v in config.to_dict()["transformer"].items() if k not in own}
    wan = randomise(diffusers.WanTransformer3DModel(**fields))
    model, path = ConceptDiT(config), tmp_path / "lora.safetensors"
    model.load_state_dict(wan.state_dict())
    spelled = {"diffusion_model.": "transformer.", "lora_down": "lora_A", "lora_up": "lora_B"}
    tensors = pairs(HERE.values())
    for theirs, ours in spelled.items():
        tensors = {key.replace(theirs, ours): value for key, value in tensors.items()}
    save(path, tensors)
    loaded = diffusers.WanPipeline.lora_state_dict(
        str(tmp_path), weight_name=path.name, local_files_only=True
    )
    loaded = diffusers.WanPipeline._maybe_expand_t2v_lora_for_i2v(wan, loaded)
    diffusers.WanPipeline.load_lora_into_transformer(loaded, wan, adapter_name="lora")
    wan.fuse_lora(lora_scale=0.7)
    wan.unload_lora()
    assert merge_lora(model, path, 0.7).left_out == ()
    for key, value in wan.state_dict().items():
        assert_close(model.state_dict()[key], value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pairs(IMAGES), "matches nothing in the transformer: its keys are .*k_img"),
        (pairs(HERE, width=32), r"does not fit: .*to_q.weight is \(24, 24\), .*lora_up.weight \(32, 2\)"),
        (
            pairs(HERE)
            | {
                "diffusion_model.patch_embedding.lora_down.weight": torch.ones(2, 9, 1, 2, 2),
                "diffusion_model.patch_embedding.lora_up.weight": torch.ones(24, 2, 1, 1, 1),
            },
            "for a transformer of 9 input channels, this one has 4: such a LoRA is not merged, nor a part",
        ),
        (
            pairs(HERE) | {"diffusion_model.patch_embedding.diff": torch.ones(24, 12, 1, 2, 2)},
            "for a transformer of 12 input channels, this one has 4",
        ),
        (
            pairs(HERE) | {"blocks.0.self_attn.k.alpha": torch.ones(1)},
            "1 keys that match nothing: .*k.alpha$",
        ),
        (pairs(HERE) | {"scaled_fp8": torch.ones(1)}, "1 keys that match nothing: scaled_fp8$"),
    ],
)
def test_what_no_part_is_merged_of(tiny, randomise, tensors, message, tmp_path):
    model, path = randomise(ConceptDiT(tiny(position_channels=0))), tmp_path / "lora.safetensors"
    before = state_of(model)
    save(path, pairs(["blocks.0.cross_attn.k_img"]) | tensors)
    with pytest.raises(WeightsError, match=message):
        merge_lora(model, path, partial=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
