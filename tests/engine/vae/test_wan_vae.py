from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.engine.vae.wan_decoder import (  # noqa: E402
    DecodeFirst,
    DecodeNext,
    build_vae,
    decode,
    encode,
)
from conceptmaster.engine.vae.wan_encoder import streaming_encoders  # noqa: E402

KINDS = {
    "patch": {},
    "no patch": {"patch_size": None, "in_channels": 3, "out_channels": 3, "scale_factor_spatial": 4},
    "wan2.1": {
        "patch_size": None,
        "in_channels": 3,
        "out_channels": 3,
        "dim_mult": [1, 2, 2, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    },
    "wan2.2": {
        "is_residual": True,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "scale_factor_spatial": 16,
    },
}


@pytest.fixture(scope="module", params=KINDS)
def vae(request, tiny):
    statistics = {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0]}
    config = tiny(vae={**preset("tiny").vae, **statistics, **KINDS[request.param]})
    torch.manual_seed(0)
    return build_vae(config)


def latents_for(frames):
    return torch.randn(1, 4, frames, 4, 6, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_streaming_equals_decoding_at_once(vae, assert_close):
    latents = latents_for(frames=4)
    whole = (decode(vae, latents)[0].permute(1, 2, 3, 0) + 1) / 2
    frames, *states = DecodeFirst(vae)(latents[:, :, :1])
    shapes = [state.shape for state in states]
    assert frames.shape == (1, *whole.shape[1:])
    assert states and all(shape[2] == 2 for shape in shapes)
    step = DecodeNext(vae)
    parts = [frames]
    for i in range(1, 4):
        frames, *states = step(latents[:, :, i : i + 1], *states)
        assert frames.shape == (4, *whole.shape[1:])
        assert [state.shape for state in states] == shapes
        parts.append(frames)
    assert_close(torch.cat(parts), whole)
    assert whole.min() >= 0 and whole.max() <= 1 and whole.std() > 0


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 5, 21])
def test_streaming_equals_diffusers_decoding(vae, assert_close, length):
    """Against AutoencoderKLWan.decode itself, with the statistics undone here."""
    latents = latents_for(length)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    expected = (vae.decode(latents * std + mean).sample[0].permute(1, 2, 3, 0) + 1) / 2
    frames, *states = DecodeFirst(vae)(latents[:, :, :1])
    parts, step = [frames], DecodeNext(vae)
    for latent in latents.split(1, dim=2)[1:]:
        frames, *states = step(latent, *states)
        parts.append(frames)
    assert len(torch.cat(parts)) == 1 + 4 * (length - 1)
    assert_close(torch.cat(parts), expected)


@torch.no_grad()
def test_states_are_not_shared_between_videos(vae):
    latents = latents_for(frames=2)
    first, step = DecodeFirst(vae), DecodeNext(vae)
    _, *states = first(latents[:, :, :1])
    kept = [state.clone() for state in states]
    one, *_ = step(latents[:, :, 1:], *states)
    again, *_ = step(latents[:, :, 1:], *states)
    assert torch.equal(one, again)
    assert all(torch.equal(state, before) for state, before in zip(states, kept, strict=True))


@torch.no_grad()
def test_encode_is_the_normalised_mean_and_causal(vae, assert_close):
    video = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode(vae, video)
    assert latents.shape[:3] == (1, 4, 3)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    assert_close(latents * std + mean, vae.encode(video).latent_dist.mode())
    assert_close(encode(vae, video[:, :, :5]), latents[:, :, :2])
    assert decode(vae, latents).shape == video.shape


@torch.no_grad()
@pytest.mark.parametrize("latent_frames", [1, 2, 5])
def test_streaming_equals_encoding_at_once(vae, latent_frames, assert_close):
    g = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 1 + 4 * (latent_frames - 1), 32, 48, generator=g) * 2 - 1
    whole = encode(vae, video)  # [1,4,F,H,W]
    first, step = streaming_encoders(vae)
    frames = video[0].permute(1, 2, 3, 0)  # [f,height,width,3]
    latents, *states = first(frames[:1])
    parts, shapes = [latents], [state.shape for state in states]
    for i in range(1, latent_frames):
        kept = [state.clone() for state in states]
        latents, *following = step(frames[4 * i - 3 : 4 * i + 1], *states)
        assert [state.shape for state in following] == shapes
        assert all(torch.equal(state, before) for state, before in zip(states, kept, strict=True))
        states = following
        parts.append(latents)
    assert_close(torch.cat(parts, dim=2), whole)
    assert whole.std() > 0
