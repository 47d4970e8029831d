"""A picture on a canvas is encoded as the picture alone, by diffusers' AutoencoderKLWan."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from conceptmaster.engine.vae.wan_area_encoder import EncodeArea  # noqa: E402


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = diffusers.AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5],
        )  # fmt: skip
        for parameter in made.parameters():  # biases and norms that show
            torch.nn.init.normal_(parameter, std=0.3)
        return made.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "size", [(96, 96), (96, 48), (16, 96), (16, 16), (32, 16), (80, 64), (48, 80), (8, 24), (40, 88)]
)
def test_the_picture_alone(vae, size):
    height, width = size
    g = torch.Generator().manual_seed(height + width)
    canvas = torch.full((1, 96, 96, 3), float("nan"))
    picture = torch.rand(1, height, width, 3, generator=g) * 2 - 1
    canvas[:, :height, :width] = picture
    area = torch.zeros(1, 1, 1, 12, 12)
    area[..., : height // 8, : width // 8] = 2.5  # any number above zero
    (found,) = EncodeArea(vae).eval()(canvas, area)
    raw = vae.encode(picture.permute(0, 3, 1, 2)[:, :, None]).latent_dist.mode()
    mean, std = (
        torch.tensor(vae.config[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    expected = (raw - mean) / std
    inside = found[..., : height // 8, : width // 8]
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=2e-5)
    outside = found.clone()
    outside[..., : height // 8, : width // 8] = 0
    assert not outside.any() and expected.std() > 0.05
