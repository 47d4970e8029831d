"""Concepts that are cut away: fused blocks that never meet them against plain blocks with a mask."""

from __future__ import annotations

import copy
import functools

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine import fused as fusing  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.seen import Seen  # noqa: E402
from conceptmaster.kernels.cross_attention import padding_bias  # noqa: E402

MASKS = {
    "the last branch": [[0, 0, 0], [0, 0, 0], [1, 1, 0]],
    "nobody": [[0, 0, 0]] * 3,
    "everybody": [[1, 1, 1]] * 3,
    "each another": [[0, 0, 0], [0, 1, 0], [1, 1, 0]],
    "a hole": [[0, 1, 0], [0, 0, 0], [0, 1, 1]],
}
LEFT = {  # K', N', and whether a mask is
    "the last branch": (1, 2, False),
    "nobody": (0, 0, False),
    "everybody": (3, 3, False),
    "each another": (2, 2, True),
    "a hole": (3, 2, True),
}


@pytest.fixture(scope="module")
def models(tiny, randomise):
    """`models(injection, absorb)`: a plain transformer in float64 and a fused one, of three concepts."""

    @functools.cache
    def build(injection, absorb=False):
        plain = randomise(ConceptDiT(tiny(injection=injection, max_concepts=3))).double()
        return plain, fusing.fuse(copy.deepcopy(plain), fusing.Fusing(absorb=absorb))

    return build


def arguments(config, seed=0):
    """Random latents, time, text and concept tokens of three branches, in float64."""
    new = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    c = config.concept
    return (
        new(3, config.transformer.in_channels, *config.latent_shape[1:]),
        torch.tensor([300.0]),
        new(3, config.text_tokens, config.transformer.text_dim),
        new(c.max_concepts, c.tokens_per_concept, c.width),
    )


def cut(model, latents, time, text, tokens, mask, **more):
    """What the model gives for tensors without what nobody sees."""
    seen = Seen.of(mask, model.config)
    kv = model.condition(text, seen.tokens(tokens), seen.mask) | more
    return model.denoise(latents, time, kv, seen.mask if seen.partly else None), kv


@pytest.mark.parametrize(
    ("injection", "absorb"),
    [("standalone", False), ("standalone", True), ("shared_query", False), ("merged", False)],
)
@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_cutting_is_masking(models, assert_close, injection, absorb, name):
    plain, fused = models(injection, absorb)
    *given, mask = *arguments(plain.config), torch.tensor(MASKS[name]).bool()
    found, kv = cut(fused, *given, mask)
    assert_close(found, plain(*given, mask), "float64")
    branches, concepts, partly = LEFT[name]
    tokens = concepts * plain.config.concept.tokens_per_concept
    if injection == "merged":
        assert kv["text_keys"].shape[1:3] == (3, plain.config.text_tokens + tokens)
        return
    assert kv["concept_keys"].shape[1:3] == (branches, tokens)
    assert Seen.of(mask, plain.config).partly == partly


@pytest.mark.parametrize("injection", ["standalone", "shared_query", "merged", "none"])
@torch.no_grad()
def test_cutting_goes_with_padding_in_one_key(models, assert_close, injection):
    plain, fused = models(injection)
    latents, time, text, tokens = arguments(plain.config)
    mask = torch.tensor(MASKS["the last branch"]).bool()
    counts, kept = torch.tensor([0, 2, 3]), 4
    text = torch.where(torch.arange(text.shape[1])[:, None] < counts[:, None, None], text, 0.0)
    bias = padding_bias(counts, kept, text.shape[1], torch.float64)
    found, _ = cut(fused, latents, time, text[:, :kept], tokens, mask, text_bias=bias)
    assert_close(found, plain(latents, time, text, tokens, mask), "float64")


@pytest.mark.parametrize("absorb", [False, True])
@torch.no_grad()
def test_nothing_is_computed_for_who_sees_nothing(models, monkeypatch, absorb):
    """Of the injector's layers and ops: of how many branches, how many tokens, with which mask."""
    _, fused = models("standalone", absorb)
    given, seen = arguments(fused.config), []
    name = "absorbed_injection" if absorb else "concept_injection"
    real = getattr(fusing, name)

    def watched(*operands):
        *_, keys, _, mask, boxes = operands
        assert boxes is None
        seen.append((*keys.shape[:2], mask))  # [K',C,A,E]
        return real(*operands)

    monkeypatch.setattr(fusing, name, watched)
    layers = [block.block.injector.to_q for block in fused.blocks]
    hooks = [
        layer.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0]))) for layer in layers
    ]
    each = 2 * fused.config.concept.tokens_per_concept
    cut(fused, *given, torch.tensor(MASKS["the last branch"]).bool())
    assert seen == [1, (1, each, None)] * len(layers)
    seen.clear()
    cut(fused, *given, torch.tensor(MASKS["nobody"]).bool())
    for hook in hooks:
        hook.remove()
    assert seen == []


def test_where_places_count_concepts_stay(tiny_base):
    config = tiny_base("references", pictures=3, positions=True)
    mask = torch.tensor([[0, 0, 0], [1, 0, 1]]).bool()
    seen = Seen.of(mask, config)
    assert seen.mask.tolist() == [[True, False, True]] and seen.concepts == [0, 1, 2] and seen.partly
    assert Seen.of(mask, tiny_base("references", pictures=3)).concepts == [0, 2]


@torch.no_grad()
def test_an_image_to_video_base_is_cut_too(tiny_base, randomise, assert_close):
    config = tiny_base("references", pictures=3)
    plain = randomise(ConceptDiT(config)).double()
    fused = fusing.fuse(copy.deepcopy(plain))
    new = functools.partial(torch.randn, dtype=torch.float64)
    latents = new(2, config.transformer.out_channels, *config.latent_shape[1:])
    frames = new(1, config.conditioning_channels, *config.latent_shape[1:])
    text, time = new(2, config.text_tokens, config.transformer.text_dim), torch.tensor([300.0])
    tokens = new(3, config.concept.picture_tokens, config.transformer.image_dim)
    for rows in ([[1, 1, 0]] * 2, [[0, 0, 0], [0, 1, 0]], [[1, 1, 1]] * 2):
        mask = torch.tensor(rows).bool()
        seen = Seen.of(mask, config)
        kv = fused.condition(text, seen.tokens(tokens), seen.mask)
        found = fused.denoise(latents, time, kv, seen.mask if seen.partly else None, frames)
        assert_close(found, plain(latents, time, text, tokens, mask, frames), "float64")
