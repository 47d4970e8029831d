from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conceptmaster.engine.concept_config import BINDINGS, ENCODERS, INJECTIONS  # noqa: E402
from conceptmaster.engine.encoders import ImageEncoder, TextEncoder  # noqa: E402
from conceptmaster.engine.model import ConceptMaster  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402


@pytest.mark.parametrize(
    ("injection", "encoder", "binding"), list(itertools.product(INJECTIONS, ENCODERS, BINDINGS))
)
def test_every_variant_learns_from_its_concepts(tiny, randomise, request_for, injection, encoder, binding):
    config = tiny(injection=injection, encoder=encoder, binding=binding)
    model = randomise(ConceptMaster(config)).train()
    request = request_for(config)
    pixels = request["pixels"].requires_grad_()
    velocity = model.velocity(**request)
    assert velocity.shape == request["latents"].shape
    velocity.square().mean().backward()
    assert velocity.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A key's bias moves all scores of a query alike: softmax does not see it.
        assert name.endswith("to_k.bias") or parameter.grad.count_nonzero() > 0, name
    mask = request["concept_mask"]
    assert pixels.grad[~mask].count_nonzero() == 0
    assert (pixels.grad[mask].flatten(1).count_nonzero(dim=1) > 0).all()


def test_padding_changes_no_bit(tiny, randomise, request_for):
    config = tiny()
    model = randomise(ConceptMaster(config))
    request = request_for(config)
    with torch.no_grad():
        expected = model.velocity(**request)
        request["pixels"][:, -1] = 3.0
        request["label_ids"][:, -1] = 7
        request["label_mask"][:, -1] = True
        assert torch.equal(model.velocity(**request), expected)
        request["pixels"][:, 0] = 3.0
        assert not torch.equal(model.velocity(**request), expected)


def test_velocity_of_a_batch_is_that_of_its_parts(tiny, randomise, request_for, assert_close):
    config = tiny()
    model = randomise(ConceptMaster(config))
    request = request_for(config, batch=3)
    with torch.no_grad():
        whole = model.velocity(**request)
        parts = [model.velocity(**{k: v[i : i + 1] for k, v in request.items()}) for i in range(3)]
    assert_close(whole, torch.cat(parts))


def test_text_is_zero_where_masked_and_does_not_see_padding(tiny, randomise, assert_close):
    config = tiny()
    encoder = randomise(TextEncoder(config.text_encoder), std=0.5)
    ids = torch.randint(2, 512, (3, config.text_tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(config.text_tokens) < torch.tensor([[5], [2], [0]])
    with torch.no_grad():
        text = encoder(ids, mask)
        label = encoder(ids[:, :6], mask[:, :6])
        other = encoder(torch.where(mask, ids, 1), mask)
    assert text.shape == (3, config.text_tokens, config.transformer.text_dim)
    assert text[~mask].count_nonzero() == 0
    assert text[mask].count_nonzero() == text[mask].numel()
    assert_close(label, text[:, :6])
    assert_close(other, text)


def test_picture_tokens_are_projected_patches(tiny, randomise, assert_close):
    config = tiny()
    encoder = randomise(ImageEncoder(config.image_encoder))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = encoder(pixels)
        whole = encoder.model(pixel_values=pixels)
        everything = encoder.model.vision_model.post_layernorm(whole.last_hidden_state)
        everything = everything @ encoder.model.visual_projection.weight.T
    assert tokens.shape == (2, config.concept.picture_tokens, config.concept.picture_dim)
    assert_close(everything[:, 0], whole.image_embeds)  # CLIP's own arithmetic, for the class token
    assert_close(tokens, everything[:, 1:])


@pytest.mark.parametrize(("name", "whole"), [("sprites", 48), ("tiny", 512)])
@torch.no_grad()
def test_what_the_text_encoder_makes_of_a_text_does_not_depend_on_padding(name, whole):
    """The shipped model's encoder and, at Wan's length, another of the same kind, in float64."""
    torch.manual_seed(0)
    encoder = TextEncoder(preset(name).text_encoder).double().eval()
    for parameter in encoder.parameters():  # positions and all far from nothing
        torch.nn.init.normal_(parameter, std=0.3)
    for count in (1, 7, 30):
        ids = torch.cat((torch.randint(2, 100, (1, count)), torch.zeros(1, whole - count).long()), dim=1)
        mask = torch.arange(whole)[None] < count
        expected = encoder(ids, mask)
        assert not expected[:, count:].any() and expected[:, :count].all()
        for kept in {count, min(whole, count + 9)}:
            found = encoder(ids[:, :kept], mask[:, :kept])
            torch.testing.assert_close(found, expected[:, :kept], rtol=1e-12, atol=1e-12)
