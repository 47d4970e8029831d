from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.engine.vae.block_vae import BlockVAE  # noqa: E402
from conceptmaster.engine.vae.wan_decoder import build_vae, decode, encode, streaming_decoders  # noqa: E402
from conceptmaster.errors import ConfigError  # noqa: E402


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = BlockVAE(6, 4, 4, 8, 2, latents_mean=[0.2] * 6, latents_std=[0.5] * 6).eval()
    vae.mean.normal_(std=0.1)
    vae.scale.uniform_(0.5, 2.0)
    return vae


def video(frames):
    return torch.rand(1, 3, frames, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_streaming_equals_decoding_at_once(vae, assert_close):
    latents = encode(vae, video(13))
    assert latents.shape == (1, 6, 4, 4, 6)
    whole = (decode(vae, latents)[0].permute(1, 2, 3, 0) + 1) / 2  # [13,16,24,3]
    first, step = streaming_decoders(vae)
    frames, state = first(latents[:, :, :1])
    assert frames.shape == (1, 16, 24, 3)
    parts = [frames]
    for i in range(1, 4):
        frames, state = step(latents[:, :, i : i + 1], state)
        assert frames.shape == (4, 16, 24, 3)
        parts.append(frames)
    assert_close(torch.cat(parts), whole)
    assert whole.min() >= 0 and whole.max() <= 1 and whole.std() > 0


@torch.no_grad()
def test_several_latent_frames_a_call_give_what_each_would(vae, assert_close):
    latents = torch.randn(1, vae.config.z_dim, 4, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    first, later = (half.double() for half in streaming_decoders(vae))
    _, start = first(latents[:, :, :1])
    parts, state = [], start
    for latent in latents[:, :, 1:].split(1, dim=2):
        frames, state = later(latent, state)
        parts.append(frames)
    together, last = later(latents[:, :, 1:], start)
    vae.float()
    assert_close(together, torch.cat(parts), "float64")
    assert torch.equal(last, state)


@torch.no_grad()
def test_encoding_and_decoding_are_causal(vae, assert_close):
    long, short = video(13), video(13)[:, :, :9]
    latents = encode(vae, long)
    assert_close(encode(vae, short), latents[:, :, :3])
    assert_close(decode(vae, latents)[:, :, :9], decode(vae, latents[:, :, :3]))


@torch.no_grad()
def test_all_components_and_a_silent_network_give_the_video_back(assert_close):
    """An orthonormal basis of the whole space loses nothing, wherever pixels go in between."""
    torch.manual_seed(0)
    size = 3 * 2 * 4 * 4
    vae = BlockVAE(size, 2, 4, 8, 1, [0.0] * size, [1.0] * size)
    vae.conv_out.weight.zero_()
    vae.conv_out.bias.zero_()
    vae.mean.normal_()
    vae.scale.uniform_(0.5, 2.0)
    x = video(7)
    assert_close(vae.decode(vae.encode(x)), x)


@torch.no_grad()
def test_the_first_frame_stands_still_for_a_block(vae, assert_close):
    still = video(1).repeat(1, 1, 5, 1, 1)
    latents = encode(vae, still)
    assert_close(latents[:, :, 0], latents[:, :, 1])


def test_the_sprites_preset_builds_it_and_its_configuration_is_checked():
    config = preset("sprites")
    assert isinstance(build_vae(config), BlockVAE)
    for change, message in (
        ({"kind": "pixels"}, "must be one of wan, blocks"),
        ({"width": 0}, "width"),
        ({"scale_factor_spatial": 7}, "multiple of its fold \\(2\\), got 7"),
        ({"fold": 3}, "multiple of its fold"),
        ({"fold": 0}, "fold"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, vae=config.vae | change)


@torch.no_grad()
def test_a_wider_fold_decodes_the_same_video_with_fewer_positions(assert_close):
    config = preset("sprites").vae | {"width": 4, "layers": 1}
    config = {name: value for name, value in config.items() if name != "kind"}
    narrow, wide = (BlockVAE(**config, fold=fold) for fold in (2, 4))
    wide.load_state_dict({name: getattr(narrow, name) for name in ("mean", "basis", "scale")}, strict=False)
    for vae in (narrow, wide):
        vae.conv_out.weight.zero_()
        vae.conv_out.bias.zero_()
    latents = torch.randn(1, 128, 2, 3, 2)
    assert_close(wide.decode(latents), narrow.decode(latents))
    assert wide.synthesise(latents[:, :, 0]).shape == (1, 4 * 4 * 4 * 3, 6, 4)
