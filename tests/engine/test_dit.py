from __future__ import annotations

import copy
import dataclasses

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from conceptmaster.engine.checkpoints.safetensors_io import load_strict  # noqa: E402
from conceptmaster.engine.concept_config import INJECTIONS  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.fused import fuse  # noqa: E402
from conceptmaster.engine.presets import PRESETS, preset  # noqa: E402
from conceptmaster.errors import WeightsError  # noqa: E402
from conceptmaster.kernels.cross_attention import padding_bias  # noqa: E402

WAN = [name for name in PRESETS if name.startswith("wan") and "vace" not in name]  # see test_control.py


def wan_for(config):
    """diffusers' transformer of the same base, randomly initialised."""
    diffusers = pytest.importorskip("diffusers")
    c = config.transformer
    return diffusers.WanTransformer3DModel(
        patch_size=c.patch_size,
        num_attention_heads=c.num_attention_heads,
        attention_head_dim=c.attention_head_dim,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        cross_attn_norm=c.cross_attn_norm,
        eps=c.eps,
        rope_max_seq_len=c.rope_max_seq_len,
    )


def arguments(config, batch=2, seed=0, latents=None):
    """Random latents, time, text, concept tokens, and a mask that leaves out the last concept."""
    g = torch.Generator().manual_seed(seed)
    c = config.concept
    shape = latents or config.latent_shape[1:]
    return (
        torch.randn(batch, config.transformer.in_channels, *shape, generator=g),
        torch.rand(batch, generator=g) * 1000,
        torch.randn(batch, config.text_tokens, config.transformer.text_dim, generator=g),
        torch.randn(batch, c.max_concepts, c.tokens_per_concept, c.width, generator=g),
        (torch.arange(c.max_concepts) < c.max_concepts - 1).repeat(batch, 1),
    )


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize(
    ("changes", "latents"),
    [
        ({}, (2, 4, 4)),
        ({}, (3, 6, 2)),
        ({"cross_attn_norm": False, "num_attention_heads": 3, "attention_head_dim": 10}, (1, 2, 8)),
        ({"patch_size": (2, 1, 2), "attention_head_dim": 32, "eps": 1e-5}, (4, 3, 4)),
    ],
)
def test_base_equals_diffusers(tiny, randomise, assert_close, changes, latents, injection):
    config = tiny(position_channels=0, injection=injection, **changes)
    wan = randomise(wan_for(config))
    model = ConceptDiT(config).eval()
    load_strict(model, wan.state_dict(), absent=model.concept_keys())
    x, time, text, concepts, mask = arguments(config, latents=latents)
    mask = torch.zeros_like(mask)
    with torch.no_grad():
        assert_close(model(x, time, text, concepts, mask), wan(x, time, text, return_dict=False)[0])


@pytest.mark.parametrize("name", [*WAN])
def test_released_sizes_have_diffusers_keys_and_shapes(name):
    config = preset(name)
    config = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, num_layers=2))
    with torch.device("meta"):
        model, wan = ConceptDiT(config), wan_for(config)
    ours = {key: value.shape for key, value in model.state_dict().items() if key not in model.concept_keys()}
    assert ours == {key: value.shape for key, value in wan.state_dict().items()}
    own = 11 if config.concept.has_modules else 0  # Wan2.2 stands alone
    assert len(model.concept_keys()) == len(model.blocks) * own


def test_base_weights_load_strictly(tiny, randomise):
    config = tiny(position_channels=0)
    state = wan_for(config).state_dict()
    model = randomise(ConceptDiT(config))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = {**state, "blocks.0.attn3.to_q.weight": state["proj_out.bias"], "proj_out.weight": torch.zeros(1)}
    del wrong["blocks.1.ffn.net.2.bias"]
    with pytest.raises(WeightsError) as error:
        load_strict(model, wrong, absent=model.concept_keys())
    for part in (
        "1 missing: blocks.1.ffn.net.2.bias",
        "1 unexpected: blocks.0.attn3.to_q",
        "1 mis-shaped: proj",
    ):
        assert part in str(error.value)
    with pytest.raises(WeightsError, match="unexpected: blocks.0.injector.norm.bias"):
        load_strict(model, before, absent=model.concept_keys())  # not a plain Wan transformer
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    load_strict(model, state, absent=model.concept_keys())
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in model.concept_keys())
    assert all(torch.equal(after[key], value) for key, value in state.items())


@pytest.mark.parametrize("injection", ["standalone", "shared_query"])
def test_an_untrained_injection_changes_nothing(tiny, randomise, injection):
    model = ConceptDiT(tiny(injection=injection))
    fresh = {key: value.clone() for key, value in model.state_dict().items() if key in model.concept_keys()}
    model = randomise(model)
    model.load_state_dict(fresh, strict=False)
    x, time, text, concepts, mask = arguments(model.config)
    with torch.no_grad():
        without = model(x, time, text, concepts, torch.zeros_like(mask))
        assert torch.equal(model(x, time, text, concepts, mask), without)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_concepts_all_masked_leave_the_base_as_it_is(tiny, randomise, assert_close, injection):
    model = randomise(ConceptDiT(tiny(injection=injection)))
    base = ConceptDiT(tiny())
    base.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k not in model.concept_keys()}, False
    )
    x, time, text, concepts, mask = arguments(model.config)
    with torch.no_grad():
        without = base(x, time, text, concepts, mask)  # its injector is still zero
        masked = model(x, time, text, concepts, torch.zeros_like(mask))
        if injection == "merged":  # one softmax over more keys: other sums of the same numbers
            assert_close(masked, without)
        else:
            assert torch.equal(masked, without)
        assert not torch.allclose(model(x, time, text, concepts, mask), without, atol=1e-3)


@pytest.fixture(scope="module")
def models(tiny, randomise):
    return {injection: randomise(ConceptDiT(tiny(injection=injection))) for injection in INJECTIONS}


@pytest.mark.parametrize("injection", INJECTIONS)
@given(
    latents=st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 6])),
    batch=st.integers(1, 3),
    content=st.sampled_from([0.0, -3.0, 1e4, float("inf"), float("nan")]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_what_a_padded_slot_holds_changes_no_bit(models, injection, latents, batch, content, seed):
    model = models[injection]
    x, time, text, concepts, _ = arguments(model.config, batch, seed, latents)
    mask = torch.rand(concepts.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.5
    other = concepts.clone()
    other[~mask] = content
    with torch.no_grad():
        assert torch.equal(model(x, time, text, concepts, mask), model(x, time, text, other, mask))


@pytest.mark.parametrize("injection", INJECTIONS)
def test_the_order_of_concepts_does_not_matter(models, assert_close, injection):
    model = models[injection]
    x, time, text, concepts, mask = arguments(model.config)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = model(x, time, text, concepts, mask)
        assert_close(model(x, time, text, concepts[:, order], mask[:, order]), expected)
        swapped = model(x, time, text, concepts[:, [0, 0, 2]], mask)
    assert not torch.allclose(swapped, expected, atol=1e-3)  # while which concepts there are does


@pytest.mark.parametrize("injection", INJECTIONS)
def test_condition_then_denoise_is_forward(models, assert_close, injection):
    model = models[injection]
    c = model.config
    x, _, text, concepts, mask = arguments(c)
    mask[0] = False
    time = torch.tensor([500.0, 500.0])
    with torch.no_grad():
        kv = model.condition(text, concepts[0], mask)  # the same concepts in both branches
        expected = model(x, time, text, concepts[:1].expand(2, -1, -1, -1), mask)
        assert torch.equal(model.denoise(x, time, kv, mask), expected)
        assert_close(model.denoise(x, time[:1], kv, mask), expected)  # one time for all
    heads = (c.transformer.num_attention_heads, c.transformer.attention_head_dim)
    added = c.concept.concept_tokens
    shapes = {name: tuple(value.shape) for name, value in kv.items()}
    if injection == "merged":
        shape = (c.transformer.num_layers, 2, c.text_tokens + added, *heads)
        assert shapes == {"text_keys": shape, "text_values": shape}
    else:
        t, n = ((c.transformer.num_layers, 2, count, *heads) for count in (c.text_tokens, added))
        assert shapes == {"text_keys": t, "text_values": t, "concept_keys": n, "concept_values": n}


@pytest.mark.parametrize("injection", INJECTIONS)
@torch.no_grad()
def test_one_key_stands_for_all_padded_text(models, injection):
    """The fused transformer, too: full text of zeros behind n tokens, against n + 1 tokens and a bias."""
    plain = copy.deepcopy(models[injection]).double()
    c, counts = plain.config, torch.tensor([0, 3])
    x, time, text, concepts, mask = (a.double() if a.is_floating_point() else a for a in arguments(c))
    text[torch.arange(c.text_tokens) >= counts[:, None]] = 0.0
    for model in (plain, fuse(copy.deepcopy(plain))):
        expected = model(x, time, text, concepts, mask)
        for kept in (4, c.text_tokens):
            kv = model.condition(text[:, :kept], concepts, mask)
            kv["text_bias"] = padding_bias(counts, kept, c.text_tokens, torch.float64)
            found = model.denoise(x, time, kv, mask)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        uncounted = kv | {"text_bias": torch.zeros_like(kv["text_bias"])[:, :4]}
        uncounted |= {name: kv[name][:, :, :4] for name in ("text_keys", "text_values")}
        if injection != "merged":
            assert not torch.allclose(model.denoise(x, time, uncounted, mask), expected, atol=1e-5)


@pytest.mark.parametrize("injection", INJECTIONS)
@torch.no_grad()
def test_what_branches_share_is_computed_once(models, injection):
    """Latents of all branches, guidance before the last product, concepts for the branch that sees them:
    against every branch on its own."""
    plain = copy.deepcopy(models[injection]).double()
    x, time, text, concepts, mask = (
        a.double() if a.is_floating_point() else a for a in arguments(plain.config)
    )
    mask[0] = False
    guidance = torch.tensor([-0.5, 1.5])
    both = plain.condition(text, concepts[0], mask)
    velocities = plain.denoise(x[:1].expand(2, -1, -1, -1, -1), time[:1].expand(2), both, mask)
    expected = 1.5 * velocities[1:] - 0.5 * velocities[:1]
    assert not torch.allclose(velocities[:1], velocities[1:], atol=1e-3)
    ways = [(plain, mask), (fuse(copy.deepcopy(plain)), mask)]
    ways += [(plain, mask[1:])] if injection == "standalone" else []
    for model, seen in ways:
        kv = model.condition(text, concepts[0], seen)
        found = model.denoise(x[:1], time[:1], kv, mask, guidance=guidance)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_a_new_model_predicts_zero(tiny):
    model = ConceptDiT(tiny())
    assert model(*arguments(model.config)).count_nonzero() == 0


@torch.no_grad()
def test_a_told_sample_and_a_told_velocity_are_the_same_network(tiny, randomise, assert_close):
    """Where one network's output is the velocity, the other reads it as data x0 and v = (x - x0) / sigma."""
    velocity = randomise(ConceptDiT(tiny())).eval()
    sample = ConceptDiT(tiny(prediction="sample")).eval()
    sample.load_state_dict(velocity.state_dict())
    x, _, *conditions = arguments(tiny())
    for sigma, divisor in ((0.8, 0.8), (0.06, 0.06), (0.01, 0.05)):
        time = torch.full((2,), sigma * 1000)
        told = velocity(x, time, *conditions)
        assert_close(sample(x, time, *conditions), (x - told) / divisor)


def test_other_sizes_than_the_configured_one_work(models, tiny, randomise):
    same = randomise(ConceptDiT(tiny(frames=9, height=16)))  # the same weights, built for another video
    model = models["standalone"]
    args = arguments(same.config)
    assert args[0].shape[2:] == (3, 2, 4)
    with torch.no_grad():
        assert torch.equal(model(*args), same(*args))
    with pytest.raises(ValueError, match="rope_max_seq_len"):
        ConceptDiT(tiny(rope_max_seq_len=1))


def test_tables_keep_their_precision_and_are_not_saved(tiny, assert_close, randomise):
    model = randomise(ConceptDiT(tiny()))
    args = arguments(model.config)
    expected = model(*args)
    low = model.to(torch.bfloat16)
    tables = dict(low.named_buffers())
    assert set(tables) == {f"positions.{n}" for n in ("cos", "sin", "planes")} | {
        "condition_embedder.time_waves.frequencies"
    }
    assert all(table.dtype == torch.float32 for table in tables.values())
    assert not set(tables) & set(low.state_dict())
    actual = low(*(a if a.dtype == torch.bool or a.ndim == 1 else a.bfloat16() for a in args))
    assert actual.dtype == torch.bfloat16
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < 0.03
