from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from conceptmaster.engine.checkpoints.diffusers_folder import open_folder  # noqa: E402
from conceptmaster.engine.checkpoints.wan import (  # noqa: E402
    Sampling,
    load_base,
    load_base_vae,
    read_config,
    read_sampling,
)
from conceptmaster.errors import ConfigError, WeightsError  # noqa: E402

SIZE, FRAMES = (64, 32), 9


@pytest.fixture
def own(wan_folder, tmp_path):
    """A copy of the folder, to be changed."""
    return shutil.copytree(wan_folder, tmp_path / "own")


def change(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def config_of(folder, size=SIZE, frames=FRAMES):
    return read_config(open_folder(folder), "tiny-wan", size, frames)


@torch.no_grad()
def test_a_folder_becomes_the_model_it_was(wan_folder, wan_parts, assert_close):
    config = config_of(wan_folder)
    assert config.latent_shape == (4, 3, 4, 8) and config.name == "tiny-wan"
    base, parts = open_folder(wan_folder), wan_parts()
    model, vae = load_base(base, config), load_base_vae(base, config)
    everything = [*model.named_parameters(), *model.named_buffers(), *vae.named_parameters()]
    assert {tensor.device.type for _, tensor in everything} == {"cpu"}
    assert not model.training and not vae.training

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 320, (2, config.text_tokens), generator=g)
    mask = torch.arange(config.text_tokens) < torch.tensor([[5], [300]])
    text = model.text_encoder(ids, mask)
    found = parts["text_encoder"](ids, mask.long()).last_hidden_state
    assert_close(text, found * mask[:, :, None])
    assert model.text_encoder.model.shared.weight is model.text_encoder.model.encoder.embed_tokens.weight

    x, time = torch.randn(2, *config.latent_shape, generator=g), torch.tensor([900.0, 300.0])
    c = config.concept
    concepts = torch.randn(2, c.max_concepts, c.queries, c.width, generator=g)
    expected = parts["transformer"](x, time, text, return_dict=False)[0]
    for present in (True, False):  # a new adapter is silent, and so is any without a concept
        mask = torch.full((2, c.max_concepts), present)
        assert_close(model.transformer(x, time, text, concepts, mask), expected)

    from conceptmaster.engine.vae.wan_decoder import decode

    mean, std = (torch.tensor(vae.config[f"latents_{n}"])[None, :, None, None, None] for n in ("mean", "std"))
    assert_close(decode(vae, x[:1]), parts["vae"].decode(x[:1] * std + mean).sample)


@torch.no_grad()
def test_what_is_not_in_any_file_has_its_values(wan_folder, assert_close):
    """Tables, positions and the new adapter, which a model on the meta device lacks."""
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    from conceptmaster.engine.model import ConceptMaster

    config = config_of(wan_folder)
    model, built = load_base(open_folder(wan_folder), config), ConceptMaster(config)
    assert dict(model.named_buffers()).keys() == dict(built.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(built.named_buffers())[name]), name
    for name in model.transformer.concept_keys():
        fresh, known = model.transformer.state_dict()[name], built.transformer.state_dict()[name]
        assert fresh.shape == known.shape and fresh.any() == known.any(), name
        if known.any():
            assert 0.5 < fresh.norm() / known.norm() < 2, name
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clip = CLIPVisionModelWithProjection.from_pretrained(wan_folder / "image_encoder").eval()
    hidden = clip.vision_model(pixels).last_hidden_state[:, 1:]
    expected = clip.visual_projection(clip.vision_model.post_layernorm(hidden))
    assert_close(model.image_encoder(pixels), expected)


@torch.no_grad()
def test_without_a_picture_encoder_it_is_the_base_alone(own, wan_parts, assert_close):
    shutil.rmtree(own / "image_encoder")
    config = config_of(own)
    assert config.concept.injection == "none" and config.image_encoder == {}
    model = load_base(open_folder(own), config)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"text_encoder", "transformer"}
    assert model.transformer.concept_keys() == set()
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, *config.latent_shape, generator=g), torch.randn(1, 7, 24, generator=g)
    time, mask = torch.tensor([500.0]), torch.ones(1, 4, dtype=torch.bool)
    concepts = model.concepts(torch.zeros(1, 4, 3, 8, 8), *torch.zeros(2, 1, 4, 5, dtype=torch.int64))
    expected = wan_parts()["transformer"](x, time, text, return_dict=False)[0]
    assert_close(model.transformer(x, time, text, concepts, mask), expected)
    concept = dataclasses.replace(config.concept, injection="standalone")
    with pytest.raises(ConfigError, match="no image_encoder/: put there the CLIP that the adapter"):
        read_config(open_folder(own), "a", SIZE, FRAMES, concept)


def test_shards_and_other_dtypes(own, wan_folder):
    from diffusers import WanTransformer3DModel

    wan = WanTransformer3DModel.from_pretrained(wan_folder / "transformer").to(torch.bfloat16)
    shutil.rmtree(own / "transformer")
    wan.save_pretrained(own / "transformer", max_shard_size="10KB")
    assert len(list((own / "transformer").glob("*.safetensors"))) > 1
    model = load_base(open_folder(own), config_of(own))
    for name, value in wan.state_dict().items():
        assert torch.equal(model.transformer.state_dict()[name], value.float()), name


def test_one_error_lists_all_tensors_that_do_not_fit(own):
    from conceptmaster.engine.checkpoints.safetensors_io import load, save

    path = own / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load(path)[0]
    del state["proj_out.bias"], state["blocks.0.attn1.to_q.weight"]
    save(path, state | {"more": torch.zeros(1), "proj_out.weight": torch.zeros(2)})
    with pytest.raises(WeightsError) as error:
        load_base(open_folder(own), config_of(own))
    for part in (
        "2 missing: blocks.0.attn1.to_q.weight; proj_out.bias",
        "1 unexpected: more",
        "1 mis-shaped",
    ):
        assert part in str(error.value)
    assert str(own / "transformer") in str(error.value)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_text_encoder_s_table_may_have_either_name(own, name):
    from conceptmaster.engine.checkpoints.safetensors_io import load, save

    path = own / "text_encoder" / "model.safetensors"
    state = dict(load(path)[0])
    (table,) = (
        state.pop(key) for key in list(state) if key in ("shared.weight", "encoder.embed_tokens.weight")
    )
    save(path, state | {name: table})
    model = load_base(open_folder(own), config_of(own)).text_encoder.model
    assert (
        torch.equal(model.shared.weight, table) and model.shared.weight is model.encoder.embed_tokens.weight
    )
    save(path, state | {"shared.weight": table, "encoder.embed_tokens.weight": table + 1})
    with pytest.raises(WeightsError, match="not the same though the model has one tensor for both"):
        load_base(open_folder(own), config_of(own))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"image_dim": 1280}, "added_kv_proj_dim must be the transformer's width"),
        ("transformer", {"added_kv_proj_dim": 24}, "added_kv_proj_dim .24. needs an image_dim"),
        ("transformer", {"pos_embed_seq_len": 514}, "pos_embed_seq_len .514. needs an image_dim"),
        ("transformer", {"vace_layers": [0]}, "vace_layers is"),
        (
            "transformer",
            {"_class_name": "WanVACETransformer3DModel"},
            "vace_layers must be numbers of blocks",
        ),
        ("transformer", {"qk_norm": "layer"}, "qk_norm must be one of"),
        ("transformer", {"num_layers": "2"}, "num_layers must be a positive"),
        ("transformer", {"position_channels": 6}, "position_channels is 6"),
        ("transformer", {"patch_size": 2}, "transformer/config.json"),
        ("transformer", {"text_dim": 32}, "must equal transformer.text_dim"),
        ("transformer", {"in_channels": 36}, "must equal transformer.in_channels"),
        ("vae", {"_class_name": "AutoencoderKL"}, "must be a AutoencoderKLWan"),
        ("vae", {"clip_output": False}, "clip_output is False"),
        ("vae", {"scale_factor_spatial": 16}, "must be 8"),
        ("vae", {"latents_std": None}, "latents_std must be a list"),
        ("vae", {"z_dim": 16}, "must have z_dim|must equal"),
        ("text_encoder", {"model_type": "t5"}, "model_type must be 'umt5', got 't5'"),
        ("text_encoder", {"d_ff": ...}, "d_ff must be a positive whole number of at most 262144, got None"),
        ("image_encoder", {"model_type": "clip"}, "must be 'clip_vision_model'"),
        ("image_encoder", {"projection_dim": 0}, "projection_dim must be a positive"),
    ],
)
def test_configurations_that_cannot_be_honoured(own, part, changes, message):
    change(own / part / "config.json", **changes)
    with pytest.raises(ConfigError, match=message) as error:
        config_of(own)
    assert "\n" not in str(error.value)


def test_pipelines_that_cannot_be_honoured(own):
    for values, message in (
        ({"boundary_ratio": 0.9}, "has boundary_ratio 0.9: one expert"),
        ({"expand_timesteps": 1}, "expand_timesteps must be true or false"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "transformer_2"),
    ):
        (own / "model_index.json").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=message):
            config_of(own)
    (own / "model_index.json").write_text(json.dumps({"transformer_2": [None, None], "boundary_ratio": None}))
    assert config_of(own)
    (own / "vae" / "config.json").unlink()
    with pytest.raises(WeightsError, match="vae/config.json is missing"):
        config_of(own)


@pytest.mark.parametrize(
    ("size", "frames", "nearest"),
    [
        ((65, 32), 9, "9 frames of 64x32"),
        ((64, 41), 10, "9 frames of 64x48"),
        ((1, 32), 7, "5 frames of 16x32"),
        ((64, 32), 0, "1 frames of 64x32"),
        ((20000, 32), 12, "13 frames of 16384x32"),
    ],
)
def test_videos_that_the_base_cannot_make(wan_folder, size, frames, nearest):
    with pytest.raises(ConfigError, match=f"nearest that works is {nearest}"):
        config_of(wan_folder, size, frames)


def test_sampling(own):
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    path = own / "scheduler" / "scheduler_config.json"
    assert read_sampling(open_folder(own)) == Sampling("unipc", 3.0)
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(own / "scheduler")
    assert read_sampling(open_folder(own)) == Sampling("euler", 5.0)
    for changes, message in (
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting must be False"),
        ({"shift": "many"}, "shift must be a positive number"),
        ({"_class_name": "DDIMScheduler"}, "must be UniPCMultistepScheduler or FlowMatch.*DDIM"),
    ):
        before = path.read_text()
        change(path, **changes)
        with pytest.raises(ConfigError, match=message):
            read_sampling(open_folder(own))
        path.write_text(before)
    UniPCMultistepScheduler().save_pretrained(own / "scheduler")
    with pytest.raises(ConfigError, match="prediction_type must be 'flow_prediction'"):
        read_sampling(open_folder(own))
    path.unlink()
    with pytest.raises(WeightsError, match="is missing"):
        read_sampling(open_folder(own))
