"""The released widths, one block deep, against diffusers: what a tiny model cannot show, as how many tokens a
picture has."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from conceptmaster.engine.checkpoints.safetensors_io import check_strict  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402

PICTURES, P, DP = 3, 257, 1280  # SkyReels-A2's; ViT-H's tokens and width
LATENTS, TEXT = (2, 4, 6), 512


def config_for(name, pictures):
    """One block of the preset; with pictures as an image-to-video model has it."""
    config = preset(name)
    transformer = dataclasses.replace(config.transformer, num_layers=1)
    if not pictures:
        concept = dataclasses.replace(config.concept, injection="none")
        return dataclasses.replace(config, transformer=transformer, concept=concept)
    transformer = dataclasses.replace(
        transformer, in_channels=36, image_dim=DP, added_kv_proj_dim=transformer.width
    )
    concept = dataclasses.replace(
        config.concept,
        max_concepts=pictures,
        picture_tokens=P,
        picture_dim=DP,
        width=DP,
        heads=1,
        injection="base",
        given="references",
    )
    image_encoder = config.image_encoder | {"hidden_size": DP}
    return dataclasses.replace(config, transformer=transformer, concept=concept, image_encoder=image_encoder)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "pictures"), [("wan2.1-1.3b", 0), ("wan2.1-14b", 0), ("wan2.1-14b", PICTURES)]
)
def test_a_block_of_released_width_is_diffusers(name, pictures, assert_close):
    from diffusers import WanTransformer3DModel

    config = config_for(name, pictures)
    ours = {"position_channels", "prediction"}
    fields = {k: v for k, v in config.to_dict()["transformer"].items() if k not in ours}
    torch.manual_seed(0)
    wan = WanTransformer3DModel(**fields).eval()
    for parameter in wan.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)  # the last projection begins at zero
    with torch.device("meta"):
        model = ConceptDiT(config).eval()
    check_strict(model, wan.state_dict(), absent=model.concept_keys())
    model.load_state_dict(wan.state_dict(), strict=False, assign=True)  # one copy serves both

    g = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, *LATENTS, generator=g)
    time = torch.tensor([700.0])
    text = torch.randn(1, TEXT, 4096, generator=g)
    if pictures:
        given = torch.randn(1, config.conditioning_channels, *LATENTS, generator=g)
        tokens = torch.randn(1, pictures, P, DP, generator=g)
        mask = torch.ones(1, pictures, dtype=torch.bool)
        found = model(latents, time, text, tokens, mask, given)
        images = {"encoder_hidden_states_image": tokens.flatten(1, 2)}
        latents = torch.cat((latents, given), dim=1)
    else:
        c = config.concept
        tokens = torch.zeros(1, c.max_concepts, c.tokens_per_concept, c.width)
        found = model(latents, time, text, tokens, torch.zeros(1, c.max_concepts, dtype=torch.bool))
        images = {}
    expected = wan(latents, time, text, return_dict=False, **images)[0]
    unit = expected.abs().max()
    assert_close(found / unit, expected / unit)
