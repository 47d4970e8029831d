import torch

from conceptmaster.engine.checkpoints.safetensors_io import save
from conceptmaster.engine.presets import preset
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.examples.stickers.training.components import add_components, doubled, halved


def known(tmp_path, count=6):
    """A VAE of ``count`` components of 4x4x4 pixels, as the sprites have it."""
    torch.manual_seed(0)
    vae = BlockVAE(count, 2, 4, 4, 1, [0.0] * count, [1.0] * count)
    vae.mean.copy_(torch.randn_like(vae.mean) * 0.1)
    vae.scale.copy_(torch.rand(count) + 0.5)
    save(tmp_path / "vae.safetensors", vae.state_dict())
    return vae


def grown(tmp_path, count=10):
    config = {"z_dim": count, "width": 4, "layers": 1, "fold": 4}
    config |= {"scale_factor_temporal": 2, "scale_factor_spatial": 8}
    config |= {"latents_mean": [0.0] * count, "latents_std": [1.0] * count, "kind": "blocks"}
    return doubled(config, tmp_path / "vae.safetensors")


def clips(count=20):
    return torch.rand(count, 3, 3, 8, 8) * 2 - 1


def test_a_frame_twice_as_large_has_the_latents_of_its_half(tmp_path):
    small = known(tmp_path)
    vae = grown(tmp_path)
    large = torch.rand(2, 3, 3, 16, 16)
    half = torch.nn.functional.avg_pool3d(large, (1, 2, 2))
    assert torch.allclose(vae.encode(large)[:, :6], small.encode(half), atol=1e-5)
    assert torch.allclose(halved(vae).encode(half), vae.encode(large), atol=1e-5)


def test_components_added_are_orthonormal_and_keep_more(tmp_path):
    known(tmp_path)
    vae, small_clips = grown(tmp_path), clips(200)
    large = small_clips.repeat_interleave(2, 3).repeat_interleave(2, 4)
    before = (vae.decode(vae.encode(large)) - large).square().mean()
    latents = vae.encode(large)[:, :6]
    add_components(vae, small_clips, 6)
    assert torch.allclose(vae.basis @ vae.basis.T, torch.eye(10), atol=1e-4)
    assert torch.allclose(vae.encode(large)[:, :6], latents)
    assert (vae.decode(vae.encode(large)) - large).square().mean() < before


def test_the_preset_folds_sixteen_pixels_into_a_latent():
    config = preset("stickers")
    assert config.latent_shape == (192, 5, 8, 8)
    assert {"fold": 4, "kind": "blocks"}.items() <= config.vae.items()
