from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.concept_config import BINDINGS, ENCODERS  # noqa: E402
from conceptmaster.engine.concepts import concept_binder, concept_encoder, mean_label  # noqa: E402


def pair(config, count, seed=0, dtype=torch.float32):
    """Visual queries, label text, and a mask with 1, 2, 3, … valid tokens."""
    g = torch.Generator().manual_seed(seed)
    c = config.concept
    visual = torch.randn(count, c.tokens_per_concept, c.width, generator=g, dtype=dtype)
    label = torch.randn(count, c.label_tokens, config.transformer.text_dim, generator=g, dtype=dtype)
    return visual, label, torch.arange(c.label_tokens) <= torch.arange(count)[:, None]


def test_dam_is_the_paper_s_equation(tiny, randomise, assert_close):
    config = tiny(heads=4)
    dam = randomise(concept_binder(config)).double()
    visual, label, mask = pair(config, 3, dtype=torch.float64)
    w = dam.state_dict()
    width = config.concept.width // 4
    for i, n in enumerate((1, 2, 3)):
        q, k, v = (
            x @ w[f"to_{name}.weight"].T
            for name, x in (("q", visual[i]), ("k", label[i, :n]), ("v", label[i, :n]))
        )
        heads = [slice(width * h, width * (h + 1)) for h in range(4)]
        read = [(q[:, h] @ k[:, h].T / math.sqrt(width)).softmax(-1) @ v[:, h] for h in heads]
        b = q + torch.cat(read, dim=-1)
        hidden = b @ w["ffn.0.weight"].T + w["ffn.0.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        c = b + hidden @ w["ffn.2.weight"].T + w["ffn.2.bias"]
        assert_close(dam(visual, label, mask)[i], c, "float64")


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoders_see_each_picture_alone(tiny, randomise, assert_close, encoder, count):
    config = tiny(encoder=encoder)
    c = config.concept
    model = randomise(concept_encoder(config))
    pictures = torch.randn(count, c.picture_tokens, c.picture_dim, generator=torch.Generator().manual_seed(1))
    out = model(pictures)
    assert out.shape == (count, c.tokens_per_concept, c.width)
    assert_close(out[-1:], model(pictures[-1:]))


@pytest.mark.parametrize("binding", BINDINGS)
def test_binders_see_each_pair_alone_and_only_valid_label_tokens(tiny, randomise, assert_close, binding):
    config = tiny(binding=binding)
    model = randomise(concept_binder(config))
    visual, label, mask = pair(config, 4)
    out = model(visual, label, mask)
    assert out.shape == visual.shape
    assert_close(out[2:3], model(visual[2:3], label[2:3], mask[2:3]))
    assert torch.equal(out, model(visual, torch.where(mask[:, :, None], label, 9.0), mask))
    changed = model(visual, label + mask[:, :, None], mask)
    assert torch.equal(changed, visual) if binding == "none" else not torch.allclose(changed, out, atol=1e-3)


@pytest.mark.parametrize("binding", BINDINGS)
def test_an_empty_label_gives_finite_tokens_and_gradients(tiny, randomise, binding):
    config = tiny(binding=binding)
    model = randomise(concept_binder(config))
    visual, label, mask = pair(config, 2)
    visual.requires_grad_()
    mask[1] = False
    out = model(visual, label, mask)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in [visual, *model.parameters()])


def test_self_attention_starts_from_the_labelled_queries(tiny, randomise, assert_close):
    model = randomise(concept_binder(tiny(binding="self_attention")))
    for parameter in model.attn.to_out.parameters():
        torch.nn.init.zeros_(parameter)
    visual, label, mask = pair(tiny(), 3)
    expected = torch.stack(
        [v + model.proj_label(y[:n]).mean(0) for v, y, n in zip(visual, label, (1, 2, 3), strict=True)]
    )
    assert_close(model(visual, label, mask), expected)


def test_self_attention_with_its_feed_forward_is_the_old_one_and_what_dam_has(tiny, randomise, assert_close):
    with_it = randomise(concept_binder(tiny(binding="self_attention_ffn")))
    without = concept_binder(tiny(binding="self_attention"))
    own = {n: value for n, value in with_it.state_dict().items() if not n.startswith("ffn.")}
    without.load_state_dict(own)  # the weights of before load into the old value, strictly
    dam = concept_binder(tiny())
    assert {n: p.shape for n, p in with_it.ffn.named_parameters()} == {
        n: p.shape for n, p in dam.ffn.named_parameters()
    }
    asked = pair(tiny(), 3)
    x = without(*asked)
    assert_close(with_it(*asked), x + with_it.ffn(x))


def test_joined_tokens_are_a_network_of_neighbours(tiny, randomise, assert_close):
    config = tiny(encoder="joined_mlp")
    model, c = randomise(concept_encoder(config)), config.concept
    pictures = torch.randn(2, c.picture_tokens, c.picture_dim, generator=torch.Generator().manual_seed(2))
    size = c.picture_tokens // c.queries
    parts = [torch.cat(list(pictures[:, q * size : (q + 1) * size].unbind(1)), 1) for q in range(c.queries)]
    assert_close(model(pictures), torch.stack([model.ffn(part) for part in parts], 1))


def test_mean_label(assert_close):
    label = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert_close(mean_label(label, mask), torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]))
