from __future__ import annotations

import dataclasses
import json

import pytest

from conceptmaster.engine.concept_config import ConceptConfig
from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.presets import PRESETS, preset
from conceptmaster.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = preset(name)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.latent_shape == config.latent_shape
    assert again.transformer.patch_size == (1, 2, 2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("tiny", (4, 2, 4, 4)), ("sprites", (128, 5, 8, 8)), ("wan2.1-1.3b", (16, 21, 60, 104))]
    + [("wan2.2-ti2v-5b", (48, 31, 44, 80))],
)
def test_latent_shape(name, shape):
    assert preset(name).latent_shape == shape


def test_presets_are_fresh():
    preset("sprites").vae["latents_mean"][0] = 5.0
    assert preset("sprites").vae["latents_mean"][0] == 0.0


def test_parts_can_be_replaced():
    config = preset("sprites")
    changed = dataclasses.replace(config, vae={**config.vae, "latents_mean": [0.5] * 128}, frames=9)
    assert changed.latent_shape == (128, 3, 8, 8)
    assert changed.vae["latents_mean"][3] == 0.5


def test_tokens_per_concept():
    assert ConceptConfig(queries=16, max_concepts=3).concept_tokens == 48
    assert ConceptConfig(encoder="mlp").tokens_per_concept == 256
    assert ConceptConfig(encoder="joined_mlp").tokens_per_concept == ConceptConfig().tokens_per_concept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a positive whole number"),
        ({"attention_head_dim": 7}, "attention_head_dim must be even"),
        ({"position_channels": 8}, "multiple of 6"),
        ({"qk_norm": "layer_norm"}, "qk_norm must be one of"),
        ({"prediction": "noise"}, "prediction must be one of velocity, sample"),
        ({"image_dim": 1280}, "added_kv_proj_dim must be the transformer's width"),
        ({"patch_size": (2, 2)}, "three positive whole numbers"),
        ({"patch_size": (1, 3, 2)}, "divide into patches"),
        ({"text_dim": 32}, "d_model"),
        ({"in_channels": 8}, "z_dim"),
        ({"encoder": "resampler"}, "encoder must be one of qformer, mlp"),
        ({"encoder": "joined_mlp", "queries": 3}, r"must be a multiple of ConceptConfig.queries \(3\) for"),
        ({"binding": "sum"}, "binding must be one of dam"),
        ({"injection": "adapter"}, "injection must be one of standalone"),
        ({"heads": 3}, "multiple of ConceptConfig.heads"),
        ({"max_concepts": True}, "max_concepts must be a positive whole number"),
        ({"label_tokens": 25}, "must not exceed text_tokens"),
        ({"picture_size": 24}, "image_size"),
        ({"picture_tokens": 5}, "picture_tokens must be 4"),
        ({"picture_dim": 8}, "projection_dim"),
        ({"frames": 6}, "1 plus a multiple of 4"),
        ({"height": 36}, "height must be a multiple of 8"),
        ({"fps": 0.0}, "fps must be 0.01 to 1000"),
        ({"vae": {"z_dim": 4}}, "must have an entry 'latents_mean'"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("latents_std", [1.0, 1.0, 1.0], "must have z_dim"),
        ("latents_std", [1.0, 1.0, 1.0, 0.0], "must be positive"),
        ("scale_factor_spatial", 16, "scale_factor_spatial"),
        ("scale_factor_temporal", 2, "scale_factor_temporal"),
    ],
)
def test_vae_that_does_not_fit_is_refused(tiny, key, value, message):
    with pytest.raises(ConfigError, match=message):
        tiny(vae={**tiny().vae, key: value})


def test_dictionaries_are_read_strictly():
    values = preset("tiny").to_dict()
    with pytest.raises(ConfigError, match="no field colour"):
        ModelConfig.from_dict({**values, "colour": 1})
    with pytest.raises(ConfigError, match="no field depth"):
        ModelConfig.from_dict({**values, "concept": {**values["concept"], "depth": 1}})
    with pytest.raises(ConfigError, match="an object 'concept'"):
        ModelConfig.from_dict({k: v for k, v in values.items() if k != "concept"})
    with pytest.raises(ConfigError, match="needs the field vae"):
        ModelConfig.from_dict({k: v for k, v in values.items() if k != "vae"})
    with pytest.raises(ConfigError, match="unknown preset 'huge'; there are tiny"):
        preset("huge")
