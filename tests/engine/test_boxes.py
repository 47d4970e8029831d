"""Boxes: which tokens of the video may see which concept, in plain and fused blocks, whole and by ranks."""

from __future__ import annotations

import copy
import functools

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.config import ModelConfig  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.fused import Fusing, fuse  # noqa: E402
from conceptmaster.engine.model import ConceptMaster  # noqa: E402
from conceptmaster.engine.seen import Seen  # noqa: E402
from conceptmaster.errors import ConfigError  # noqa: E402

KINDS = [("standalone", False), ("standalone", True), ("shared_query", False)]


@pytest.fixture(scope="module")
def models(tiny, randomise):
    """`models(injection, absorb)`: a plain transformer in float64 and a fused one, of three concepts."""

    @functools.cache
    def build(injection, absorb=False):
        plain = randomise(ConceptDiT(tiny(injection=injection, mask="boxes", max_concepts=3))).double()
        return plain, fuse(copy.deepcopy(plain), Fusing(absorb=absorb))

    return build


def arguments(config, branches=3, seed=0):
    """Random latents, time, text, concept tokens, a mask (the last branch sees the first two concepts, the
    one before the second), and boxes: of the first concept none, so that some tokens see nothing."""
    new = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    c = config.concept
    mask = torch.zeros(branches, 3, dtype=torch.bool)
    mask[-1, :2] = mask[-2:, 1] = True
    boxes = torch.rand(8, 3, generator=torch.Generator().manual_seed(seed)) < 0.5  # [S,N]
    boxes[:3] = False
    assert boxes[:, 0].any() and boxes[:, 1].any()
    return (
        new(branches, config.transformer.in_channels, *config.latent_shape[1:]),
        torch.tensor([300.0]),
        new(branches, config.text_tokens, config.transformer.text_dim),
        new(c.max_concepts, c.tokens_per_concept, c.width),
        mask,
        boxes,
    )


@pytest.mark.parametrize("injection", ["standalone", "shared_query"])
@torch.no_grad()
def test_a_token_outside_sees_nothing_and_one_inside_its_concepts(models, assert_close, injection):
    """Token by token: a block whose self-attention is silent does for each what it does for it alone."""
    plain, _ = models(injection)
    block = copy.deepcopy(plain.blocks[0])
    torch.nn.init.zeros_(block.attn1.to_out[0].weight)
    *_, text, tokens, mask, boxes = arguments(plain.config)
    kv = block.conditions(
        plain.condition_embedder.text_embedder(text), tokens.flatten(0, 1)[None].repeat(3, 1, 1)
    )
    x = torch.randn(3, 8, plain.config.transformer.width, dtype=torch.float64)
    modulation, rotary = torch.randn(1, 6, x.shape[2], dtype=torch.float64), torch.ones(2, 8, 1, 6).double()
    by_key = functools.partial(torch.repeat_interleave, repeats=2, dim=1)  # [·,N] -> [·,C]
    found = block(x, modulation, rotary, kv._replace(boxes=boxes[None]), by_key(mask))
    for token in range(8):
        allowed = by_key(mask & boxes[token])
        alone = block(x[:, token, None], modulation, rotary[:, token, None], kv, allowed)
        assert_close(found[:, token, None], alone, "float64")


@pytest.mark.parametrize(("injection", "absorb"), KINDS)
@torch.no_grad()
def test_boxes_everywhere_are_none_and_nowhere_no_concepts(models, assert_close, injection, absorb):
    for model in models(injection, absorb):
        *given, mask, boxes = arguments(model.config)
        everywhere = model(*given, mask, None, torch.ones_like(boxes))
        assert_close(everywhere, model(*given, mask), "float64")
        nowhere = model(*given, mask, None, torch.zeros_like(boxes))
        assert torch.equal(nowhere, model(*given, torch.zeros_like(mask)))
        assert (model(*given, mask, None, boxes) - everywhere).abs().max() > 1e-3


@pytest.mark.parametrize(("injection", "absorb"), KINDS)
@torch.no_grad()
def test_fused_and_cut_is_plain(models, assert_close, injection, absorb):
    plain, fused = models(injection, absorb)
    latents, time, text, tokens, mask, boxes = arguments(plain.config)
    expected = plain(latents, time, text, tokens, mask, None, boxes)
    assert_close(fused(latents, time, text, tokens, mask, None, boxes), expected, "float64")
    seen = Seen.of(mask, plain.config)
    assert seen.concepts == [0, 1] and seen.partly
    kv = fused.condition(text, seen.tokens(tokens), seen.mask) | {"boxes": seen.boxes(boxes, 2)}
    assert_close(fused.denoise(latents, time, kv, seen.mask), expected, "float64")


def test_boxes_that_hide_nothing_of_what_is_seen_are_left_out(models):
    config = models("standalone")[0].config
    *_, mask, boxes = arguments(config)
    boxes[:, :2] = True
    assert not boxes.all() and Seen.of(mask, config).boxes(boxes, 2) is None
    assert Seen.of(torch.zeros_like(mask), config).boxes(boxes, 2) is None


@torch.no_grad()
def test_each_video_of_a_batch_has_its_own(models, assert_close):
    plain, fused = models("standalone")
    *given, mask, boxes = arguments(plain.config)
    every = torch.stack((boxes, ~boxes, boxes.flip(1)))
    mask[:] = True
    found = plain(*given, mask, None, every)
    for row in range(3):
        latents, time, text, tokens = given
        alone = plain(latents[row, None], time, text[row, None], tokens, mask[:1], None, every[row])
        assert_close(found[row, None], alone, "float64")
    mask[0] = False  # and of those that see no concept none counts
    seen = Seen.of(mask, plain.config)
    kv = fused.condition(given[2], seen.tokens(given[3]), seen.mask) | {"boxes": every}
    assert_close(fused.denoise(*given[:2], kv, None), plain(*given, mask, None, every), "float64")


def test_gradients_are_finite_and_reach_what_is_seen(tiny, randomise, request_for):
    config = tiny(mask="boxes")
    model = randomise(ConceptMaster(config))
    asked = request_for(config)
    boxes = torch.zeros(2, 8, config.concept.max_concepts, dtype=torch.bool)
    boxes[:, 2, 0] = True
    asked["pixels"].requires_grad_()
    model.velocity(**asked, boxes=boxes).square().sum().backward()
    gradient = asked["pixels"].grad
    assert gradient.isfinite().all() and gradient[:, 0].abs().max() > 0
    assert not gradient[:, 1:].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_wrong_boxes_are_one_clear_error(tiny, models):
    plain, _ = models("standalone")
    *given, mask, boxes = arguments(plain.config)
    with pytest.raises(ValueError, match="boxes must be of the video's 8 tokens, not of 7"):
        plain(*given, mask, None, boxes[:7])
    for count in (2, 4):  # of which 2 divide the 6 keys
        with pytest.raises(ValueError, match=f"of the 3 concepts that there are, not of {count}"):
            plain(*given, mask, None, torch.ones(8, count, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bool \[S,N\] or \[K,S,N\], not \[8\]"):
        plain(*given, mask, None, boxes[:, 0])
    for wrong in (mask[:, :1], mask[:, [0, *range(mask.shape[1])]], mask[0]):
        with pytest.raises(ValueError, match=r"concept_mask must be bool \[K,3\]"):
            plain(*given, wrong, None, boxes)
    other = ConceptDiT(tiny()).double()
    with pytest.raises(ValueError, match="ConceptConfig.mask is 'boxes'"):
        other(*given, mask, None, boxes)


def test_any_weights_can_have_them_and_the_configuration_tells(tiny):
    model = ConceptMaster(tiny())
    before = model.config.to_dict()
    assert "mask" not in before["concept"]
    model.mask_by("boxes")
    assert model.config.concept.mask == model.transformer.config.concept.mask == "boxes"
    assert model.config.to_dict()["concept"] == before["concept"] | {"mask": "boxes"}
    assert ModelConfig.from_dict(model.config.to_dict()) == model.config
    for injection in ("merged", "none"):
        with pytest.raises(ConfigError, match=f"standalone and shared_query, not for '{injection}'"):
            ConceptMaster(tiny(injection=injection)).mask_by("boxes")
