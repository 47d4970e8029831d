"""What concepts may and may not change, over random shapes of request."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from conceptmaster.engine.concept_config import INJECTIONS  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.model import ConceptMaster  # noqa: E402

SHAPES = {
    "latents": st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 6])),
    "batch": st.integers(1, 3),
    "concepts": st.integers(1, 5),
    "seed": st.integers(0, 1000),
}


def request(config, latents, batch, concepts, seed):
    """Latents, time, text, concept tokens, mask: all random."""
    g = torch.Generator().manual_seed(seed)
    c = config.concept
    return (
        torch.randn(batch, config.transformer.in_channels, *latents, generator=g),
        torch.rand(batch, generator=g) * 1000,
        torch.randn(batch, config.text_tokens, config.transformer.text_dim, generator=g),
        torch.randn(batch, concepts, c.tokens_per_concept, c.width, generator=g),
        torch.rand(batch, concepts, generator=g) < 0.6,
    )


@pytest.fixture(scope="module")
def trained(tiny, randomise):
    return {injection: randomise(ConceptDiT(tiny(injection=injection))) for injection in INJECTIONS}


@pytest.fixture(scope="module")
def bases(tiny, trained):
    """The base of each of `trained`, alone, and with a new adapter."""
    made = {}
    for injection in ("standalone", "shared_query"):
        own = trained[injection].concept_keys()
        weights = {name: value for name, value in trained[injection].state_dict().items() if name not in own}
        torch.manual_seed(1)
        alone, new = (ConceptDiT(tiny(injection=name)).eval() for name in ("none", injection))
        alone.load_state_dict(weights)
        new.load_state_dict(weights, strict=False)
        made[injection] = alone, new
    return made


@pytest.mark.parametrize("injection", ["standalone", "shared_query"])
@given(**SHAPES)
@settings(max_examples=12, deadline=None)
@torch.no_grad()
def test_a_new_adapter_equals_the_base_exactly(bases, injection, **shapes):
    alone, new = bases[injection]
    values = request(new.config, **shapes)
    assert torch.equal(new(*values), alone(*values))


@pytest.mark.parametrize("injection", ["standalone", "shared_query"])
@given(**SHAPES)
@settings(max_examples=12, deadline=None)
@torch.no_grad()
def test_any_adapter_without_a_concept_equals_the_base_exactly(trained, bases, injection, **shapes):
    alone, _ = bases[injection]
    *values, mask = request(trained[injection].config, **shapes)
    none = torch.zeros_like(mask)
    assert torch.equal(trained[injection](*values, none), alone(*values, none))


@pytest.mark.parametrize("injection", INJECTIONS)
@given(order=st.permutations(range(5)), **SHAPES)
@settings(max_examples=12, deadline=None)
@torch.no_grad()
def test_the_order_of_concepts_changes_nothing(trained, assert_close, injection, order, **shapes):
    x, time, text, tokens, mask = request(trained[injection].config, **shapes)
    order = [i for i in order if i < mask.shape[1]]
    expected = trained[injection](x, time, text, tokens, mask)
    assert_close(trained[injection](x, time, text, tokens[:, order], mask[:, order]), expected)


@given(order=st.permutations(range(3)), batch=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
@torch.no_grad()
def test_permuted_pictures_and_labels_are_permuted_tokens(
    tiny, randomise, request_for, assert_close, order, batch, seed
):
    config = tiny()
    model = randomise(ConceptMaster(config))
    values = request_for(config, batch, seed)
    given = [values[name] for name in ("pixels", "label_ids", "label_mask")]
    tokens = model.concepts(*given)  # [B,N,Q,Dc]
    assert_close(model.concepts(*(value[:, order] for value in given)), tokens[:, order])
