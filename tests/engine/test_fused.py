"""The fused transformer against the plain one: its references, and its kernels in Triton's interpreter."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine import layers  # noqa: E402
from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.fused import (  # noqa: E402
    WIDE,
    FusedBlock,
    Fusing,
    compute_exactly,
    fuse,
    narrow,
    why_not,
)
from conceptmaster.engine.tiers import PARTS, EightBits  # noqa: E402
from conceptmaster.kernels import (  # noqa: E402
    absorbed_injection,
    common,
    cross_attention,
    modulate,
    qk_norm_rope,
)
from conceptmaster.kernels.tolerances import RELATIVE_L2  # noqa: E402

INJECTIONS = ("standalone", "shared_query", "merged", "none")
OPS = {
    "modulate": modulate._modulate,
    "residual_modulate": modulate._residual_modulate,
    "qk_norm_rope": qk_norm_rope._qk_norm_rope,
    "inverse_rms": qk_norm_rope._inverse_rms,
    "decoupled_cross_attention": cross_attention._decoupled,
    "concept_injection": cross_attention._injection,
    "concept_weights": absorbed_injection._weights,
}


def arguments(config, batch=2, seed=0):
    """Random latents, time, text, concept tokens, and a mask: nothing in the first branch, one left out."""
    g = torch.Generator().manual_seed(seed)
    c = config.concept
    mask = (torch.arange(c.max_concepts) < c.max_concepts - 1).repeat(batch, 1)
    mask[0] = False
    return (
        torch.randn(batch, config.transformer.in_channels, *config.latent_shape[1:], generator=g),
        torch.rand(1, generator=g) * 1000,
        torch.randn(batch, config.text_tokens, config.transformer.text_dim, generator=g),
        torch.randn(c.max_concepts, c.tokens_per_concept, c.width, generator=g),
        mask,
    )


def pair(config, randomise, fusing=None):
    """A plain transformer and a fused one of the same weights."""
    fusing = fusing or Fusing()
    plain = randomise(ConceptDiT(config))
    return plain, fuse(copy.deepcopy(plain), fusing)


def stored(tensors):
    """Bytes that tensors take, those that several share once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture
def kernels(monkeypatch):
    """Has the ops run what they run on CUDA, in the interpreter; gives the names of those that ran."""
    pytest.importorskip("triton")
    if not common.INTERPRETED:
        pytest.skip("Triton was imported before the tests could ask for its interpreter")
    ran = set()

    def watched(name, function):
        def call(*given):
            ran.add(name)
            return function(*given)

        return call

    monkeypatch.setattr(common, "served", lambda *arguments: True)
    for name, op in OPS.items():
        monkeypatch.setattr(op, "op", watched(name, op._checked(op.cuda)))
    return ran


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("injection", INJECTIONS)
@torch.no_grad()
def test_references_give_the_plain_transformer(tiny, randomise, assert_close, injection, absorb):
    for changes in ({}, {"cross_attn_norm": False, "prediction": "sample"}):
        config = tiny(injection=injection, **changes)
        plain, fused = pair(config, randomise, Fusing(absorb=absorb))
        assert all(isinstance(block, FusedBlock) for block in fused.blocks)
        assert fused.blocks[0].absorb == (absorb and injection == "standalone")
        given = arguments(config)
        assert_close(fused(*given), plain(*given))


@pytest.mark.parametrize(("injection", "absorb"), [*((i, False) for i in INJECTIONS), ("standalone", True)])
@torch.no_grad()
def test_kernels_give_the_plain_transformer(kernels, tiny, randomise, assert_close, injection, absorb):
    config = tiny(injection=injection)
    plain, fused = pair(config, randomise, Fusing(absorb=absorb))
    given = arguments(config)
    expected = plain(*given)
    kernels.clear()
    assert_close(fused(*given), expected)
    always = {"modulate", "residual_modulate", "qk_norm_rope"}
    own = {
        "standalone": {"concept_weights"} if absorb else {"concept_injection"},
        "shared_query": {"inverse_rms", "decoupled_cross_attention"},
    }
    assert kernels == always | own.get(injection, set())


@pytest.mark.parametrize(
    ("injection", "absorb"), [("standalone", False), ("standalone", True), ("shared_query", False)]
)
@torch.no_grad()
def test_kernels_follow_boxes(kernels, tiny, randomise, assert_close, injection, absorb):
    config = tiny(injection=injection, mask="boxes")
    plain, fused = pair(config, randomise, Fusing(absorb=absorb))
    boxes = torch.rand(8, config.concept.max_concepts, generator=torch.Generator().manual_seed(1)) < 0.4
    boxes[:2] = False
    *given, mask = arguments(config)
    expected = plain(*given, mask, None, boxes)
    assert (expected - plain(*given, mask)).abs().max() > 1e-3
    assert_close(fused(*given, mask, None, boxes), expected)
    nowhere = fused(*given, mask, None, torch.zeros_like(boxes))
    assert torch.equal(nowhere, fused(*given, torch.zeros_like(mask)))


@torch.no_grad()
def test_no_weight_is_there_twice_and_plain_blocks_go_on(tiny, randomise, assert_close):
    plain = randomise(ConceptDiT(tiny()))
    given, (block, *_) = arguments(plain.config), plain.blocks
    expected = plain(*given)
    size = stored(plain.parameters())
    fused = fuse(plain)
    assert stored([*fused.parameters(), *block.parameters()]) == size
    assert sum(p.numel() * p.element_size() for p in fused.parameters()) == size
    q, k, v = block.attn1.to_q.weight, block.attn1.to_k.weight, block.attn1.to_v.weight
    assert torch.equal(torch.cat((q, k, v)), fused.blocks[0].attn1.to_qkv.weight)
    assert_close(fused(*given), expected)


@torch.no_grad()
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_on_cuda_gelu_is_in_the_product(assert_close, monkeypatch, approximate):
    """CUDA's `_addmm_activation` is the tanh one, the CPU's is not: so it is played here."""
    calls = []

    def on_cuda(bias, rows, weight, use_gelu):
        calls.append(tuple(rows.shape))
        return torch.nn.functional.gelu(torch.addmm(bias, rows, weight), approximate="tanh")

    layer, x = layers.GeluProjection(6, 10, approximate).double(), torch.randn(2, 5, 6).double()
    expected = layer(x)
    monkeypatch.setattr(layers, "served", lambda *_: True)
    monkeypatch.setattr(torch, "_addmm_activation", on_cuda)
    assert_close(layer(x), expected)
    assert calls == ([(10, 6)] if approximate == "tanh" else [])


@torch.no_grad()
def test_of_one_concept_the_kernels_see_every_token(kernels, tiny, randomise, assert_close):
    """Its mask is one number, which stands for all of its tokens."""
    for injection in ("standalone", "shared_query"):
        plain, fused = pair(tiny(injection=injection, max_concepts=1), randomise)
        given = (*arguments(plain.config)[:4], torch.tensor([[False], [True]]))
        assert_close(fused(*given), plain(*given))


@torch.no_grad()
def test_kernels_in_bfloat16_are_as_near_as_the_plain_transformer(kernels, tiny, randomise):
    """Held to float32: fusing must not add to the error that bfloat16 has anyway."""
    config = tiny()
    exact, fused = pair(config, randomise)
    plain = narrow(copy.deepcopy(exact), torch.bfloat16)
    fused = fuse(narrow(copy.deepcopy(exact), torch.bfloat16))
    x, time, text, concepts, mask = arguments(config)
    low = x.bfloat16(), time, text.bfloat16(), concepts.bfloat16(), mask
    expected = exact(x, time, text, concepts, mask)
    errors = [float((m(*low).float() - expected).norm() / expected.norm()) for m in (plain, fused)]
    assert errors[1] < 1.5 * errors[0] < 0.05


def test_narrow_keeps_what_diffusers_keeps(tiny):
    diffusers = pytest.importorskip("diffusers")
    kept = set(diffusers.WanTransformer3DModel._keep_in_fp32_modules) - {"rope"}  # no weights
    assert all(any(name in part for part in WIDE) for name in kept)
    model = narrow(ConceptDiT(tiny()), torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["blocks.0.norm2.weight"] == dtypes["scale_shift_table"] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == dtypes["proj_out.bias"] == torch.bfloat16


@torch.no_grad()
def test_masked_concepts_change_no_bit(tiny, randomise):
    for absorb in (False, True):
        _, fused = pair(tiny(), randomise, Fusing(absorb=absorb))
        x, time, text, concepts, mask = arguments(fused.config)
        other = concepts.clone()
        other[-1] = float("nan")
        assert torch.equal(fused(x, time, text, concepts, mask), fused(x, time, text, other, mask))


@torch.no_grad()
def test_the_high_tier_is_near_and_says_how_near(tiny, randomise):
    config = tiny(num_attention_heads=2, attention_head_dim=16, ffn_dim=64)
    plain, fused = pair(config, randomise, Fusing(tier="high", absorb=False))
    given = arguments(config)
    expected = plain(*given)
    error = float((fused(*given) - expected).norm() / expected.norm())
    assert 1e-3 < error < 3 * RELATIVE_L2["linear8"]  # several such layers, one behind the other
    names = {name for name, module in fused.named_modules() if type(module).__name__ == "Fp8Linear"}
    first = {name.removeprefix("blocks.0.").removeprefix("block.") for name in names if "blocks.0." in name}
    attn = {"attn1.to_qkv", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"}
    assert first == attn | {"ffn.net.0", "ffn.net.2", "injector.to_q", "injector.to_out"}


BITS = {
    "first layer": EightBits(first_layers=1),
    "last layer": EightBits(last_layers=1),
    "attention alone": EightBits(parts=("attention",)),
    "up alone": EightBits(parts=("up",)),
    "down alone": EightBits(parts=("down",), fast=("down",)),
}


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
@torch.no_grad()
def test_a_table_says_what_is_in_8_bits(bits, tiny, randomise):
    config = tiny(num_attention_heads=2, attention_head_dim=16, ffn_dim=64)
    plain, fused = pair(config, randomise, Fusing(eight=bits, absorb=False))
    expected, found = (model(*arguments(config)) for model in (plain, fused))
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 3 * RELATIVE_L2["linear8"]
    assert not any(type(module).__name__ == "Fp8Linear" for module in plain.modules())
    for index, block in enumerate(fused.blocks):
        layers = [name for name, module in block.named_modules() if type(module).__name__ == "Fp8Linear"]
        here = bits.layer(index, len(fused.blocks))
        assert (block.attn1.qk_steps is not None) == (here and "attention" in bits.parts)
        wanted = {name for part in bits.parts for name in PARTS[part]} if here else set()
        assert set(layers) in (wanted, wanted - {"block.ffn.net.0.proj"} | {"block.ffn.net.0"})


@torch.no_grad()
def test_steps_may_stay_in_16_bits(tiny, randomise):
    config = tiny(num_attention_heads=2, attention_head_dim=16, ffn_dim=64)
    _, lossless = pair(config, randomise)
    _, high = pair(config, randomise, Fusing(tier="high"))
    _, both = pair(config, randomise, Fusing(eight=EightBits(first_steps=1)))
    given = arguments(config)
    assert torch.equal(both(*given), high(*given))
    compute_exactly(both, True)
    assert torch.equal(both(*given), lossless(*given))
    compute_exactly(both, False)
    assert torch.equal(both(*given), high(*given))
    bits = EightBits(first_steps=1, last_steps=2)
    assert [bits.step(step, 5) for step in range(5)] == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"parts": ("ffn",)}, "unknown part 'ffn': choose of qkv, attention, out, cross, injector, up, down"),
        ({"fast": ("ffn",)}, "unknown part 'ffn'"),
        ({"last_steps": -1}, "last_steps must be 0 or more, not -1"),
    ],
)
def test_a_wrong_table_is_one_clear_error(given, words):
    with pytest.raises(ValueError, match=words):
        EightBits(**given)


@pytest.mark.parametrize(
    ("fusing", "dtype", "capability", "words"),
    [
        (
            Fusing(tier="high"),
            torch.bfloat16,
            (8, 0),
            "the tier 'high' is not for this GPU: fp8 needs compute",
        ),
        (Fusing(tier="high"), torch.float32, (9, 0), "the tier 'high' is for bfloat16 on a GPU, not float32"),
        (
            Fusing(attention="flash-attention-3"),
            torch.float32,
            (9, 0),
            "the attention 'flash-attention-3' is not",
        ),
    ],
)
def test_a_card_that_cannot_is_named(fusing, dtype, capability, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(*shape, **options))
    found = why_not(fusing, torch.device("cuda", 0), dtype, 128)
    assert found is not None and found.startswith(words) and "\n" not in found
    assert why_not(fusing, torch.device("cpu"), dtype, 128) is None


def test_another_tier_is_one_clear_error():
    with pytest.raises(ValueError, match="unknown tier 'fast': choose one of lossless, high"):
        Fusing(tier="fast")
