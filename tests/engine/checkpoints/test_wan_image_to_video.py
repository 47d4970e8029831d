"""Image-to-video bases: the transformer and the picture encoder against diffusers and transformers."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from conceptmaster.engine.checkpoints.safetensors_io import load_strict  # noqa: E402
from conceptmaster.engine.config import ModelConfig  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.errors import ConfigError, WeightsError  # noqa: E402

P, DP, TEXT = 5, 16, 512  # diffusers takes the last 512 tokens for the text, all before for the pictures


@pytest.fixture(scope="module")
def pair_for(tiny_base, randomise):
    """`pair_for(given, pictures, positions)`: diffusers' transformer and ours with the same weights."""

    def build(given="first", pictures=1, positions=False):
        from diffusers import WanTransformer3DModel

        config = tiny_base(given, pictures, positions)
        ours = {"position_channels", "prediction"}
        fields = {k: v for k, v in config.to_dict()["transformer"].items() if k not in ours}
        wan = randomise(WanTransformer3DModel(**fields))
        transformer = ConceptDiT(config).eval()
        load_strict(transformer, wan.state_dict(), absent=transformer.concept_keys())
        return wan, transformer

    return build


def inputs_for(config, branches=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    n, channels = config.concept.max_concepts, config.conditioning_channels
    return {
        "latents": torch.randn(branches, *config.latent_shape, generator=g),
        "time": torch.rand(branches, generator=g) * 1000,
        "text": torch.randn(branches, TEXT, 16, generator=g),
        "concept_tokens": torch.randn(branches, n, P, DP, generator=g),
        "concept_mask": torch.ones(branches, n, dtype=torch.bool),
        "conditioning": torch.randn(branches, channels, *config.latent_shape[1:], generator=g),
    }


def upstream(wan, x, pictures=slice(None)):
    """diffusers': latents and conditioning behind one another, picture tokens in front of the text's."""
    return wan(
        torch.cat((x["latents"], x["conditioning"]), dim=1),
        x["time"],
        x["text"],
        encoder_hidden_states_image=x["concept_tokens"][:, pictures].flatten(1, 2),
        return_dict=False,
    )[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("given", "pictures", "positions"),
    [("first", 1, False), ("references", 2, False), ("references", 3, False), ("first_last", 2, False)],
)
def test_the_transformer_is_diffusers(pair_for, given, pictures, positions, assert_close):
    wan, transformer = pair_for(given, pictures, positions)
    assert transformer.concept_keys() == set()
    x = inputs_for(transformer.config)
    expected = upstream(wan, x)
    assert_close(transformer(**x), expected)
    without = transformer(**x | {"concept_mask": ~x["concept_mask"]})
    assert (without - expected).abs().max() > 0.1  # pictures matter
    assert (transformer(**x | {"conditioning": -x["conditioning"]}) - expected).abs().max() > 0.1


@torch.no_grad()
def test_places_of_a_first_and_a_last_picture(pair_for, assert_close):
    wan, transformer = pair_for("first_last", 2, positions=True)
    x = inputs_for(transformer.config)
    # Upstream wants the two pictures of a request as two of a batch.
    pairs = x["concept_tokens"].flatten(0, 1)  # [K*N,P,Dp]
    embedded = wan.condition_embedder.image_embedder(pairs)  # [K,N*P,D]
    assert_close(transformer.condition_embedder.image_embedder(x["concept_tokens"].flatten(1, 2)), embedded)
    expected = wan(
        torch.cat((x["latents"], x["conditioning"]), dim=1),
        x["time"],
        x["text"],
        encoder_hidden_states_image=pairs,
        return_dict=False,
    )[0]
    assert_close(transformer(**x), expected)
    swapped = transformer(**x | {"concept_tokens": x["concept_tokens"].flip(1)})
    assert (swapped - expected).abs().max() > 1e-3  # of float32, a hundred times the tolerance


@torch.no_grad()
@pytest.mark.parametrize("present", [1, 2])
def test_padded_pictures_change_nothing(pair_for, present, assert_close):
    wan, transformer = pair_for("references", 3)
    x = inputs_for(transformer.config)
    x["concept_mask"][:, present:] = False
    found = transformer(**x)
    for filling in (0.0, 1e3, float("nan")):
        tokens = x["concept_tokens"].clone()
        tokens[:, present:] = filling
        assert torch.equal(transformer(**x | {"concept_tokens": tokens}), found)
    assert_close(found, upstream(wan, x, slice(0, present)))
    # in one branch only
    x["concept_mask"][0] = True
    mixed = transformer(**x)
    assert_close(mixed[:1], upstream(wan, x)[:1])
    assert_close(mixed[1:], found[1:])


@torch.no_grad()
def test_the_order_of_pictures_says_nothing_to_the_attention(pair_for, assert_close):
    _, transformer = pair_for("references", 3)
    x = inputs_for(transformer.config)
    other = x | {"concept_tokens": x["concept_tokens"][:, [2, 0, 1]]}
    assert_close(transformer(**other), transformer(**x))


def test_diffusers_weights_load_strictly(pair_for):
    wan, transformer = pair_for()
    state = wan.state_dict()
    gone = [name for name in state if "image_embedder.norm2" in name or "blocks.1.attn2.add_k_proj" in name]
    assert len(gone) == 4
    with pytest.raises(WeightsError) as error:
        wrong = {k: v for k, v in state.items() if k not in gone} | {"more": torch.zeros(1)}
        load_strict(transformer, wrong, absent=transformer.concept_keys())
    assert all(name in str(error.value) for name in (*gone, "4 missing", "1 unexpected: more"))


@torch.no_grad()
def test_pictures_are_read_before_clip_s_last_layer(tiny_base, randomise, assert_close):
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionModel

    from conceptmaster.engine.model import ConceptMaster

    config = tiny_base("references", 3)
    model = ConceptMaster(config).eval()
    clip = randomise(CLIPVisionModel(CLIPVisionConfig(**config.image_encoder)))
    model.image_encoder.model.load_state_dict(clip.state_dict())
    pixels = torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    hidden = clip(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
    found = model.concepts(pixels, *torch.zeros(2, 2, 3, 4, dtype=torch.int64))
    assert found.shape == (2, 3, P, DP)
    assert_close(found.flatten(0, 1), hidden)
    assert {name.partition(".")[0] for name in model.state_dict()} == {
        "text_encoder",
        "image_encoder",
        "transformer",
    }


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"image_dim": None}, "added_kv_proj_dim \\(24\\) needs an image_dim"),
        ("transformer", {"added_kv_proj_dim": 16}, "must be the transformer's width \\(24\\).*got 16"),
        ("transformer", {"added_kv_proj_dim": None}, "must be the transformer's width"),
        ("transformer", {"in_channels": 16}, "in_channels must be 12 for this VAE .*got 16"),
        ("transformer", {"pos_embed_seq_len": 514}, "\\(514\\) must equal the pictures' tokens \\(15\\)"),
        ("transformer", {"pos_embed_seq_len": 0}, "pos_embed_seq_len must be a positive"),
        ("concept", {"injection": "shared_query", "given": "none"}, "injection must be 'base' where"),
        ("concept", {"given": "none"}, "given must be 'first' or .* where the injection is 'base'"),
        ("concept", {"given": "first"}, "max_concepts must be 1 for 'first', got 3"),
        ("concept", {"given": "last"}, "given must be one of none, first_last, .*references, canvas, got"),
        ("concept", {"picture_tokens": 4}, "picture_tokens must be 5"),
        ("concept", {"width": 24, "heads": 2}, "concept.width \\(24\\) must equal transformer.image_dim"),
        (None, {"frames": 9}, "frames must be at least 13"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_base, part, changes, message):
    config = tiny_base("references", 3)
    with pytest.raises(ConfigError, match=message):
        if part is None:
            dataclasses.replace(config, **changes)
        else:
            dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)})


def test_configurations_travel(tiny_base):
    config = tiny_base("first_last", 2, positions=True)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert (config.conditioning_channels, config.latent_shape[0]) == (8, 4)
