"""A clean first frame: its tokens' own time, against diffusers' transformer with a time for each token."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.checkpoints.safetensors_io import load_strict  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.fused import fuse  # noqa: E402

LATENTS = (3, 4, 6)


@pytest.fixture(scope="module")
def model(tiny, randomise):
    config = tiny(position_channels=0, injection="none", given="clean", max_concepts=1)
    return randomise(ConceptDiT(config)).eval()


def arguments(config):
    """Random latents and times of two videos, text, concept tokens that nothing reads, and their mask."""
    g = torch.Generator().manual_seed(0)
    c = config.concept
    return (
        torch.randn(2, config.transformer.in_channels, *LATENTS, generator=g),
        torch.rand(2, generator=g) * 1000,
        torch.randn(2, config.text_tokens, config.transformer.text_dim, generator=g),
        torch.zeros(2, c.max_concepts, c.tokens_per_concept, c.width),
        torch.zeros(2, c.max_concepts, dtype=torch.bool),
    )


def given(config, mask, seed=3):
    """A picture's latents behind its mask, [1,1+Cz,1,H,W]."""
    g = torch.Generator().manual_seed(seed)
    z = config.latent_shape[0]
    clean = torch.randn(1, z, 1, *LATENTS[1:], generator=g)
    return torch.cat((torch.full_like(clean[:, :1], mask), mask * clean), dim=1)


@torch.no_grad()
@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_a_time_for_each_token_is_diffusers(model, assert_close, mask):
    diffusers = pytest.importorskip("diffusers")
    config = model.config
    values = config.to_dict()["transformer"]
    wan = diffusers.WanTransformer3DModel(
        **{k: v for k, v in values.items() if k not in ("position_channels", "prediction")}
    )
    load_strict(wan, model.state_dict())
    x, time, text, concepts, seen = arguments(config)
    picture = given(config, mask)
    free = torch.ones(1, 1, *LATENTS)
    free[:, :, 0] = 1 - mask
    known = (1 - free) * picture[:, 1:] + free * x  # as diffusers' pipeline blends them
    times = torch.stack([(free[0, 0, :, ::2, ::2] * t).flatten() for t in time])  # [B,S]
    expected = wan(known, times, text, return_dict=False)[0]
    found = model(x, time, text, concepts, seen, picture)
    assert_close(found, expected)
    if mask:
        assert not torch.allclose(found, model(x, time, text, concepts, seen), atol=1e-2)
    else:
        assert_close(found, model(x, time, text, concepts, seen))


@torch.no_grad()
@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_fused_blocks_know_a_frames_own_time(model, assert_close, mask):
    """Also where the branches share the latents until their texts part them, and with a bias for padding."""
    x, _, text, concepts, seen = arguments(model.config)
    time, picture = torch.tensor([600.0]), given(model.config, mask)
    fused = fuse(copy.deepcopy(model))
    weights = torch.tensor([-1.0, 2.0])
    for latents in (x, x[:1]):
        results = []
        for transformer in (model, fused):
            kv = transformer.condition(text, concepts, seen)
            results += [transformer.denoise(latents, time, kv, None, picture)]
            results += [transformer.denoise(latents, time, kv, None, picture, weights)]
        assert_close(results[2], results[0])
        assert_close(results[3], results[1])
