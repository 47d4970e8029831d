"""Pictures as clean frames behind the video's, against diffusers' WanTransformer3DModel of F + N frames."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.checkpoints.safetensors_io import load_strict  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.fused import fuse  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.engine.step import DenoiseStep  # noqa: E402
from conceptmaster.errors import ConfigError  # noqa: E402


@pytest.fixture(scope="module")
def behind(tiny):
    """`behind(max_concepts=3, …)`: the tiny preset with pictures behind the video."""

    def build(**changes):
        own = {"position_channels": 0, "injection": "none", "given": "behind", "max_concepts": 2}
        return tiny(**own | changes)

    return build


def upstream(config):
    """diffusers' transformer of the same configuration."""
    diffusers = pytest.importorskip("diffusers")
    own = ("position_channels", "prediction")
    values = config.to_dict()["transformer"]
    return diffusers.WanTransformer3DModel(**{k: v for k, v in values.items() if k not in own})


def arguments(config, latents, branches=2, seed=0):
    """Latents of one video, a time, texts of some branches, pictures and text without concepts."""
    g = torch.Generator().manual_seed(seed)
    c, count = config.transformer, config.concept.max_concepts
    return (
        torch.randn(1, c.in_channels, *latents, generator=g),
        torch.rand(1, generator=g) * 1000,
        torch.randn(branches, config.text_tokens, c.text_dim, generator=g),
        torch.randn(1, c.in_channels, count, *latents[1:], generator=g),
    )


def keys_values(model, text):
    c = model.config.concept
    none = torch.zeros(len(text), c.max_concepts, c.tokens_per_concept, c.width)
    return model.condition(text, none, torch.zeros(len(text), c.max_concepts, dtype=torch.bool))


MASKS = {
    1: [[[True, True]], [[True, False]]],
    2: [[[False, False], [True, True]], [[True, True], [True, True]]],
    3: [[[False, False], [True, True], [True, True]], [[False, False], [False, True], [True, False]]],
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "latents"),
    [({}, (3, 4, 4)), ({"patch_size": (1, 1, 2)}, (1, 3, 6)), ({"attention_head_dim": 10}, (2, 8, 2))],
)
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_each_branch_is_diffusers(behind, randomise, assert_close, changes, latents, branches):
    """Of F + N frames, the last N dropped; plain and fused, alone and guided."""
    config = behind(**changes)
    wan = randomise(upstream(config))
    model = ConceptDiT(config).eval()
    load_strict(model, wan.state_dict())
    fused = fuse(copy.deepcopy(model))
    x, time, text, pictures = arguments(config, latents, branches)
    weights = torch.tensor([-4.0, -2.5, 7.5])[-branches:]
    weights[0] += 1 - weights.sum()
    for mask in map(torch.tensor, MASKS[branches]):
        seen = torch.where(mask[:, None, :, None, None], pictures, 0.0)
        whole = torch.cat((x.expand(branches, -1, -1, -1, -1), seen), dim=2)
        expected = wan(whole, time.expand(branches), text, return_dict=False)[0][:, :, : latents[0]]
        told = [mask, None] if mask.all() else [mask]
        for transformer in (model, fused):
            kv = keys_values(transformer, text)
            for concept_mask in told:
                found = transformer.denoise(x, time, kv, concept_mask, pictures)
                assert_close(found, expected)
                found = transformer.denoise(x, time, kv, concept_mask, pictures, weights)[0]
                assert_close(found, torch.tensordot(weights, expected, 1))


@torch.no_grad()
def test_a_step_reads_the_mask_and_no_hidden_picture(behind, randomise):
    """What a branch does not see changes no bit of it, not even where it is not a number."""
    config = behind()
    step = DenoiseStep(randomise(ConceptDiT(config)))
    x, time, text, pictures = arguments(config, config.latent_shape[1:])
    kv = keys_values(step.transformer, text)
    mask = torch.tensor([[False, False], [True, False]])
    coefficients = torch.eye(5)[1:]
    given = (x.expand(4, -1, -1, -1, -1), time, mask, torch.tensor([-1.0, 2.0]), coefficients)
    found = step(*given, pictures, *kv.values())
    pictures[:, :, 1] = torch.nan
    assert found.isfinite().all() and step(*given, pictures, *kv.values()).equal(found)
    pictures[:, :, 0] += 1
    assert not step(*given, pictures, *kv.values()).allclose(found, atol=1e-3)


def test_what_a_configuration_says(behind):
    config = behind(max_concepts=4, fewest=1)
    assert config.denoised_shape == config.latent_shape and config.conditioning_channels == 4
    assert type(config).from_dict(config.to_dict()) == config
    assert "fewest" not in behind().to_dict()["concept"]
    rows = ConceptDiT(config).positions.cos.shape[0]
    _, frames, height, width = config.latent_shape
    assert rows == (frames + 4) * (height // 2) * (width // 2)


@pytest.mark.parametrize(
    ("name", "frames", "pictures"),
    [("phantom-wan-1.3b", 21, 1), ("phantom-wan-14b", 31, 1), ("skyreels-v3-r2v-14b", 31, 4)],
)
def test_released_sizes_have_diffusers_keys_and_shapes(name, frames, pictures):
    config = preset(name)
    with torch.device("meta"):
        model, wan = ConceptDiT(config), upstream(config)
    found = {key: value.shape for key, value in model.state_dict().items()}
    assert found == {key: value.shape for key, value in wan.state_dict().items()}
    assert config.latent_shape[1] == config.denoised_shape[1] == frames
    grid = config.latent_shape[2] // 2 * (config.latent_shape[3] // 2)
    assert model.positions.cos.shape == ((frames + pictures) * grid, 1, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fewest": 3}, "fewest must be 1 to 2 for 'behind'"),
        ({"fewest": 0}, "fewest must be 1 to 2 for 'behind'"),
        ({"given": "control", "fewest": 1}, "fewest must be 1 to 2 for 'behind'"),
        ({"patch_size": (2, 1, 1)}, "patches of one latent frame"),
        ({"position_channels": 6}, "no position_channels"),
        ({"in_channels": 8}, "z_dim"),
        ({"injection": "standalone"}, "given must be 'none' where"),
    ],
)
def test_what_does_not_fit_is_refused(behind, changes, message):
    with pytest.raises(ConfigError, match=message):
        behind(**changes)
