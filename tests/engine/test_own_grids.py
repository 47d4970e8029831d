"""Pictures on grids of their own, against Bernini's recipe of packed tokens by diffusers' modules."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from conceptmaster.engine.checkpoints.safetensors_io import load_strict  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.fused import fuse  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.engine.step import DenoiseStep  # noqa: E402
from conceptmaster.errors import ConfigError  # noqa: E402

SIDE = 96
SIZES = [(4, 12), (12, 12), (2, 2), (10, 6), (12, 2), (6, 8)]  # in latents, of a side of 12 at most


@pytest.fixture(scope="module")
def grids(tiny):
    """`grids(max_concepts=3, …)`: the tiny preset with pictures on grids of their own."""

    def build(**changes):
        own = {"position_channels": 0, "injection": "none", "given": "grids", "max_concepts": 3, "side": SIDE}
        return tiny(**own | {"guidance_rule": "projected"} | changes)

    return build


def upstream(config):
    own = ("position_channels", "prediction")
    values = config.to_dict()["transformer"]
    return diffusers.WanTransformer3DModel(**{k: v for k, v in values.items() if k not in own})


def arguments(config, branches, count, seed=0):
    """Latents of a video, a time, a text for each branch, and `count` pictures."""
    g = torch.Generator().manual_seed(seed)
    c = config.transformer
    return (
        torch.randn(1, *config.latent_shape, generator=g),
        torch.rand(1, generator=g) * 1000,
        torch.randn(branches, config.text_tokens, c.text_dim, generator=g),
        [torch.randn(1, c.in_channels, 1, *SIZES[n], generator=g) for n in range(count)],
    )


def packed(config, pictures, sources, outside=0.0):
    """As the graph gets them."""
    length = config.concept.side // 8
    given = torch.full(
        (1, config.conditioning_channels, config.concept.max_concepts, length, length), outside
    )
    given[:, 0] = 0.0
    for n, (picture, source) in enumerate(zip(pictures, sources, strict=True)):
        height, width = picture.shape[3:]
        given[:, 0, n, :height, :width] = source
        given[:, 1:, n, :height, :width] = picture[:, :, 0]
    return given


def keys_values(model, text):
    c = model.config.concept
    none = torch.zeros(len(text), c.max_concepts, c.tokens_per_concept, c.width)
    return model.condition(text, none, torch.zeros(len(text), c.max_concepts, dtype=torch.bool))


def kept_places(given):
    return (given[0, 0, :, ::2, ::2].flatten() > 0).nonzero().flatten()


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize(
    ("most", "sources"), [(3, (1.0,)), (3, (1.0, 2.0, 3.0)), (6, (1.0, 1.8, 2.6, 3.4, 4.2, 5.0))]
)
def test_each_branch_is_the_packed_sequence(
    grids, randomise, assert_close, with_own_grids, branches, most, sources
):
    """Plain and fused, by a mask of all places or by the kept places alone; the first of several branches has
    none."""
    config = grids(max_concepts=most)
    wan = randomise(upstream(config))
    model = ConceptDiT(config).eval()
    load_strict(model, wan.state_dict())
    x, time, text, pictures = arguments(config, branches, len(sources))
    seen = [branches == 1 or k > 0 for k in range(branches)]
    expected = torch.cat([
        with_own_grids(wan, x, pictures if s else [], sources if s else [], time, text[k : k + 1])
        for k, s in enumerate(seen)
    ])  # fmt: skip
    mask = torch.zeros(branches, most, dtype=torch.bool)
    mask[min(1, branches - 1) :, : len(sources)] = True
    given = packed(config, pictures, sources, outside=1e3)
    for transformer in (model, fuse(copy.deepcopy(model))):
        kv = keys_values(transformer, text)
        for rows in (mask, mask[min(1, branches - 1) :]):
            assert_close(transformer.denoise(x, time, kv, rows, given), expected)
        kept = kv | {"kept": kept_places(given)}
        assert_close(transformer.denoise(x, time, kept, mask[min(1, branches - 1) :], given), expected)
    given[:, 0] *= 1.5  # other sources, another phase
    other = model.denoise(x, time, keys_values(model, text), mask, given)
    assert abs(other - expected)[-1].max() > 1e-3


@torch.no_grad()
def test_squares_of_another_side(grids, randomise, assert_close, with_own_grids):
    """Than the configuration's: what graphs of a small video are compared at."""
    wan = randomise(upstream(grids()))
    x, time, text, pictures = arguments(grids(), 1, 1)
    expected = with_own_grids(wan, x, pictures, [1.0], time, text)
    for side in (160, 96):
        model = ConceptDiT(grids(side=side)).eval()
        load_strict(model, wan.state_dict())
        mask = torch.tensor([[True, False, False]])
        found = model.denoise(x, time, keys_values(model, text), mask, packed(grids(), pictures, [1.0]))
        assert_close(found, expected)


@torch.no_grad()
def test_a_picture_that_fills_its_square_needs_no_mask(grids, randomise, assert_close, with_own_grids):
    config = grids(max_concepts=1)
    wan = randomise(upstream(config))
    model = ConceptDiT(config).eval()
    load_strict(model, wan.state_dict())
    x, time, text, _ = arguments(config, 1, 0)
    picture = torch.randn(1, 4, 1, 12, 12)
    expected = with_own_grids(wan, x, [picture], [1.0], time, text)
    for mask in (None, torch.ones(1, 1, dtype=torch.bool)):
        found = model.denoise(x, time, keys_values(model, text), mask, packed(config, [picture], [1.0]))
        assert_close(found, expected)


@torch.no_grad()
def test_a_step_guides_by_projection_and_reads_nothing_hidden(grids, randomise):
    """sigma is what the solver's third row says, not the time."""
    from conceptmaster.engine.guidance import projected

    config = grids()
    step = DenoiseStep(randomise(ConceptDiT(config), std=1.0))
    x, time, text, pictures = arguments(config, 3, 2)
    kv = keys_values(step.transformer, text)
    mask = torch.tensor([[False] * 3, [True, True, False], [True, True, False]])
    coefficients = torch.eye(5)[1:]  # the last row is the velocity alone
    coefficients[2] = torch.tensor([1.0, 0, 0, 0, -0.37])
    weights, given = torch.tensor([-3.5, 0.5, 4.0]), packed(config, pictures, (1.0, 2.0))
    state = torch.cat((x, torch.zeros_like(x).expand(3, -1, -1, -1, -1)))
    found = step(state, time, mask, weights, coefficients, given, *kv.values())
    each = step.transformer.denoise(x, time, kv, mask, given)
    torch.testing.assert_close(
        found[3:], projected(each, x, torch.tensor([0.37]), weights), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(found[3:], projected(each, x, torch.tensor([0.9]), weights), atol=1e-2)
    given[:, 1:, 2] = 7.0  # of a place without a picture
    torch.testing.assert_close(step(state, time, mask, weights, coefficients, given, *kv.values()), found)


def test_what_a_configuration_says(grids):
    config = grids(max_concepts=2)
    assert config.denoised_shape == config.latent_shape and config.conditioning_channels == 5
    assert type(config).from_dict(config.to_dict()) == config
    plain = preset("tiny").to_dict()
    assert "guidance_rule" not in plain and "side" not in plain["concept"]
    _, frames, height, width = config.latent_shape
    rows = ConceptDiT(config).positions.cos.shape[0]
    assert rows == frames * (height // 2) * (width // 2) + 2 * (SIDE // 16) ** 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": 90}, "side must be a multiple of 16"),
        ({"side": None}, "side must be a multiple of 16"),
        ({"side": 0}, "side must be a multiple of 16"),
        ({"given": "behind"}, "side must be a multiple of 16 up to 4096 for 'grids' and None for others"),
        ({"patch_size": (1, 1, 2)}, "patches of 16 pixels a side"),
        ({"position_channels": 6}, "no position_channels"),
        ({"guidance_rule": "other"}, "guidance_rule must be one of"),
        ({"rope_max_seq_len": 5}, "side must be 80 at most"),
        ({"in_channels": 8}, "z_dim"),
    ],
)
def test_what_does_not_fit_is_refused(grids, changes, message):
    with pytest.raises(ConfigError, match=message):
        grids(**changes)
