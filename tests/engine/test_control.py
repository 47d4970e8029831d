"""VACE's blocks beside the transformer's, against diffusers' WanVACETransformer3DModel."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.checkpoints.safetensors_io import load_strict  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.fused import fuse  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.errors import ConfigError  # noqa: E402

CHANNELS = 2 * 4 + 8 * 8


@pytest.fixture(scope="module")
def vace(tiny):
    """`vace(vace_layers=(0, 2), …)`: the tiny preset as a VACE of four blocks."""

    def build(**changes):
        own = {"num_layers": 4, "vace_layers": (0, 2), "vace_in_channels": CHANNELS, "position_channels": 0}
        concept = {"injection": "none", "given": "control", "max_concepts": 2}
        return tiny(**own | concept | changes)

    return build


def upstream(config):
    """diffusers' transformer of the same configuration."""
    diffusers = pytest.importorskip("diffusers")
    values = config.to_dict()["transformer"]
    own = ("position_channels", "prediction")
    return diffusers.WanVACETransformer3DModel(**{k: v for k, v in values.items() if k not in own})


def arguments(config, latents, seed=0):
    """Random latents and times of two videos, text, and a control each."""
    g = torch.Generator().manual_seed(seed)
    c = config.transformer
    return (
        torch.randn(2, c.in_channels, *latents, generator=g),
        torch.rand(2, generator=g) * 1000,
        torch.randn(2, config.text_tokens, c.text_dim, generator=g),
        torch.randn(2, c.vace_in_channels, *latents, generator=g),
    )


def ours(model, x, time, text, control):
    c = model.config.concept
    concepts = torch.zeros(len(x), c.max_concepts, c.tokens_per_concept, c.width)
    return model(x, time, text, concepts, torch.ones(len(x), c.max_concepts, dtype=torch.bool), control)


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "latents", "scales"),
    [
        ({}, (4, 4, 4), (1.0, 1.0)),
        ({"vace_layers": (0, 1, 3)}, (3, 6, 2), (0.5, 2.0, -1.0)),
        ({"vace_layers": (0,), "cross_attn_norm": False, "attention_head_dim": 10}, (5, 2, 8), (1.7,)),
        (
            {"vace_layers": (0, 1, 2), "patch_size": (1, 1, 2), "eps": 1e-5},
            (2, 3, 4),
            (1.0, 0.0, 0.3),
        ),
    ],
)
def test_the_transformer_is_diffusers(vace, randomise, assert_close, changes, latents, scales):
    """A scale multiplies a hint, so it is the same as one of its projection's weights."""
    config = vace(**changes)
    wan = randomise(upstream(config))
    model = ConceptDiT(config).eval()
    load_strict(model, wan.state_dict())
    x, time, text, control = arguments(config, latents)
    expected = wan(x, time, text, None, control, torch.tensor(scales), return_dict=False)[0]
    for block, scale in zip(model.vace_blocks, scales, strict=True):
        for parameter in block.proj_out.parameters():
            parameter.mul_(scale)
    found = ours(model, x, time, text, control)
    assert_close(found, expected)
    assert not torch.allclose(found, ours(model, x, time, text, control.flip(2)), atol=1e-2)


@torch.no_grad()
def test_fused_blocks_take_hints(vace, randomise, assert_close):
    """Also where the branches share latents and control until their texts part them."""
    config = vace()
    model = randomise(ConceptDiT(config))
    fused = fuse(copy.deepcopy(model))
    x, time, text, control = arguments(config, (4, 4, 4))
    weights, mask = torch.tensor([-1.0, 2.0]), torch.ones(2, 2, dtype=torch.bool)
    concepts = torch.zeros(2, 2, config.concept.tokens_per_concept, config.concept.width)
    for latents in (x, x[:1]):
        found = []
        for transformer in (model, fused):
            kv = transformer.condition(text, concepts, mask)
            shared = (latents, time[:1], kv, None, control[:1])
            found += [transformer.denoise(*shared), transformer.denoise(*shared, weights)]
        assert_close(found[2], found[0])
        assert_close(found[3], found[1])


@pytest.mark.parametrize(("name", "blocks"), [("wan2.1-vace-1.3b", 15), ("wan2.1-vace-14b", 8)])
def test_released_sizes_have_diffusers_keys_and_shapes(name, blocks):
    config = preset(name)
    with torch.device("meta"):
        model, wan = ConceptDiT(config), upstream(config)
    found = {key: value.shape for key, value in model.state_dict().items()}
    assert found == {key: value.shape for key, value in wan.state_dict().items()}
    assert len(model.vace_blocks) == blocks
    assert config.latent_shape == (16, 21, 60, 104) and config.denoised_shape == (16, 22, 60, 104)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vace_layers": (1, 2)}, "vace_layers must be numbers of blocks from 0 upwards, below 4"),
        ({"vace_layers": (0, 4)}, "vace_layers must be"),
        ({"vace_layers": (0, 2, 2)}, "vace_layers must be"),
        ({"vace_layers": ()}, "vace_layers must be"),
        ({"vace_layers": 3}, "vace_layers must be"),
        ({"vace_layers": (False, 2)}, "vace_layers must be"),
        ({"vace_layers": None}, "needs vace_layers"),
        ({"vace_layers": None, "vace_in_channels": None}, "given must be 'control' where"),
        ({"vace_in_channels": 96}, "vace_in_channels must be 72 for this VAE"),
        ({"vace_in_channels": None}, "vace_in_channels must be a positive whole number"),
        ({"given": "none"}, "given must be 'control' where"),
        ({"in_channels": 8}, "z_dim"),
        ({"max_concepts": 0}, "max_concepts must be"),
    ],
)
def test_what_does_not_fit_is_refused(vace, changes, message):
    with pytest.raises(ConfigError, match=message):
        vace(**changes)
