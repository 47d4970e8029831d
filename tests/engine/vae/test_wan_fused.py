"""Wan's VAE with channels last: the values of diffusers' modules, however many latent frames a call takes."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.engine.vae.wan_decoder import build_vae, decode, encode, streaming_decoders  # noqa: E402
from conceptmaster.engine.vae.wan_encoder import streaming_encoders  # noqa: E402
from conceptmaster.engine.vae.wan_fused import (  # noqa: E402
    FusedDecoder,
    FusedEncoder,
    fused_modules,
    subpixel,
)

WAN = {"num_res_blocks": 2, "temperal_downsample": [False, True, True]}
COLOURS = {"patch_size": None, "in_channels": 3, "out_channels": 3}
KINDS = {
    "tiny": {},
    "wan2.1": {**WAN, **COLOURS, "dim_mult": [1, 2, 2, 4]},
    "wan2.2": {**WAN, "is_residual": True, "dim_mult": [1, 2, 4, 4], "scale_factor_spatial": 16},
}
LATENT_FRAMES = 7


@pytest.fixture(scope="module", params=KINDS)
def vae(request, tiny):
    """With random weights everywhere, norms and biases, too; in float64, nothing of it computed narrower."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample

    statistics = {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0]}
    torch.manual_seed(0)
    vae = build_vae(tiny(vae={**preset("tiny").vae, **statistics, **KINDS[request.param]}))
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if weight.dim() == 1 or "gamma" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanUpsample, "forward", torch.nn.Upsample.forward)
        yield vae


def in_calls(first, later, video, count, axis, seen):
    """A causal pair over a video, `seen` frames of it for the first, `count` for each other call."""
    begin, rest = video.split([seen, video.shape[axis] - seen], dim=axis)
    made, *states = first(begin)
    parts = [made]
    for part in rest.split(count, dim=axis):
        made, *following = later(part, *states)
        assert [s.shape for s in following] == [s.shape for s in states]
        states = following
        parts.append(made)
    return parts, states


@torch.no_grad()
def test_several_latent_frames_a_call_give_what_each_would(vae, assert_close):
    """Decoding, in float64: calls of one, two and four latent frames, four leaving a rest of two."""
    latents = torch.randn(1, 4, LATENT_FRAMES, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    plain = [module.double() for module in streaming_decoders(copy.deepcopy(vae).double())]
    parts, states = in_calls(*plain, latents, 1, 2, 1)
    expected = torch.cat(parts)
    assert expected.std() > 0.05
    fused = FusedDecoder(copy.deepcopy(vae).double())
    for first, later, count in ((*plain, 4), (fused, fused, 1), (fused, fused, 2), (fused, fused, 4)):
        parts, found = in_calls(first, later, latents, count, 2, 1)
        assert_close(torch.cat(parts), expected, "float64")
        for state, right in zip(found, states, strict=True):
            assert_close(state, right, "float64")


@torch.no_grad()
def test_several_latent_frames_are_encoded_in_one_call(vae, assert_close):
    side = 2 * vae.config.scale_factor_spatial
    g = torch.Generator().manual_seed(0)
    video = torch.rand(1 + 4 * (LATENT_FRAMES - 1), side, side, 3, generator=g).double() * 2 - 1
    own = copy.deepcopy(vae)
    plain = [module.double() for module in streaming_encoders(own)]
    parts, states = in_calls(*plain, video, 4, 0, 1)
    expected = torch.cat(parts, dim=2)
    fused = FusedEncoder(copy.deepcopy(vae).double())
    for first, later, count in ((*plain, 4), (fused, fused, 1), (fused, fused, 2), (fused, fused, 4)):
        parts, found = in_calls(first, later, video, 4 * count, 0, 1)
        assert_close(torch.cat(parts, dim=2), expected, "float64")
        for state, right in zip(found, states, strict=True):
            assert_close(state, right, "float64")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_frames_are_those_of_diffusers(vae, dtype, assert_close):
    """In float32 within its tolerance; in 16 bits with float32's statistics, frames and latents."""
    latents = torch.randn(1, 4, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = (decode(vae, latents)[0].permute(1, 2, 3, 0) + 1) / 2
    video = decode(vae, latents)
    own = fused_modules(copy.deepcopy(vae), {"decode_first", "decode", "encode_first", "encode"}, dtype)
    parts, states = in_calls(own["decode_first"], own["decode"], latents, 4, 2, 1)
    frames = torch.cat(parts)
    assert frames.dtype == torch.float32 and {state.dtype for state in states} == {dtype}
    parts, _ = in_calls(own["encode_first"], own["encode"], video[0].permute(1, 2, 3, 0), 8, 0, 1)
    found, exact = torch.cat(parts, dim=2), encode(vae, video)
    assert found.dtype == torch.float32
    if dtype == torch.float32:
        assert_close(frames, expected)
        assert_close(found, exact)
    else:
        relative = {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
        for a, b in ((frames, expected), (found, exact)):
            assert (a - b).norm() < relative * b.norm()


def test_the_sub_pixel_weights_are_those_of_the_enlarged_picture(assert_close):
    g = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=g).double() for shape in ((5, 3, 3, 3), (2, 3, 4, 7)))
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = torch.nn.functional.conv2d(large, weight, padding=1)
    found = torch.nn.functional.conv2d(x, subpixel(weight), padding=1).unflatten(1, (2, 2, 5))
    for row in (0, 1):
        for column in (0, 1):
            part = found[:, row, column, :, row : row + 4, column : column + 7]
            assert_close(part, expected[:, :, row::2, column::2], "float64")
