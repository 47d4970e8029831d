"""What computes in 8 bits, in Triton's interpreter: against its own reference, and the exact result."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from conceptmaster.kernels import self_attention as attending  # noqa: E402
from conceptmaster.kernels.cross_attention import attention  # noqa: E402
from conceptmaster.kernels.fp8_linear import (  # noqa: E402
    Fp8Linear,
    fp8_linear,
    quantise_rows,
    quantise_rows_triton,
)
from conceptmaster.kernels.self_attention import attention8_triton, self_attention  # noqa: E402
from conceptmaster.kernels.tolerances import RELATIVE_L2  # noqa: E402

OPS = torch.ops.conceptmaster


def tensors(batch, tokens, heads, width, dtype=torch.float32, offset=0.0, seed=0):
    """q, k, v [B,S,A,E]; all keys have a common offset, as those of trained models do."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, tokens, heads, width, generator=g) for _ in range(3))
    k = k + offset * torch.randn(1, 1, heads, width, generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def l2(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("shape", "dtype", "offset"),
    [
        ((1, 300, 2, 128), torch.bfloat16, 0.0),  # three blocks, the last not full
        ((2, 140, 2, 12), torch.float32, 3.0),
        ((1, 128, 1, 64), torch.float16, 3.0),  # one full block
        ((1, 1, 1, 32), torch.float16, 0.0),
    ],
)
def test_attention_in_8_bits_is_as_near_as_the_table_says(shape, dtype, offset):
    q, k, v = tensors(*shape, dtype=dtype, offset=offset)
    out = attention8_triton(torch.full_like(q, float("nan")), q, k, v)
    assert l2(out, attention(q.double(), k.double(), v.double())) < RELATIVE_L2["attention8"]
    # beside its reference it only rounds probabilities, to 3 bits of mantissa: 2^-4 at most, 2^-4 / sqrt(3)
    # or so
    assert l2(out, attending.attention8_reference(q, k, v)) < 0.03


def test_the_keys_mean_costs_no_accuracy():
    q, k, v = tensors(1, 130, 1, 32, offset=20.0)
    exact = attention(q.double(), k.double(), v.double())
    smoothed, _ = attending.int8_reference(k, attending.key_mean(k))
    assert l2(attending.attention8_reference(q, k, v), exact) < RELATIVE_L2["attention8"]
    rough, step = attending.int8_reference(k, None)  # without taking the mean out
    keys = (rough.unflatten(2, (-1, 128)) * step[..., None, None]).flatten(2, 3)[:, :, :130].transpose(1, 2)
    assert l2(attention(q, keys, v), exact) > 2 * RELATIVE_L2["attention8"]
    assert smoothed.abs().amax() == 127


def test_strides_are_followed():
    q, k, v = tensors(2, 20, 2, 16)
    fused = torch.stack((q, k, v), dim=2).unbind(2)
    outs = [attention8_triton(torch.full_like(q, float("nan")), *given) for given in (fused, (q, k, v))]
    assert torch.equal(*outs)


def test_lossless_is_exact_and_the_default(assert_close):
    q, k, v = tensors(2, 40, 2, 16)
    assert_close(self_attention(q, k, v), attention(q.double(), k.double(), v.double()))
    assert torch.equal(self_attention(q, k, v), self_attention(q, k, v, "lossless"))
    assert torch.equal(self_attention(q, k, v, "high"), attending.attention8_reference(q, k, v))


def test_a_row_is_quantised_by_its_largest(assert_close):
    x = (
        torch.randn(5, 200, generator=torch.Generator().manual_seed(0))[:, :100]
        * torch.logspace(-3, 3, 5)[:, None]
    )
    out = torch.empty(5, 100, dtype=torch.float8_e4m3fn), torch.full((5, 1), float("nan"))
    found, scale = quantise_rows_triton(*out, x)
    expected, right = quantise_rows(x)
    assert_close(scale / right, torch.ones_like(right))
    assert (found.float().abs().amax(-1) == 448).all()
    # the interpreter's fp8 is cut off where it has no exponent left; elsewhere it is the same number
    large = expected.float().abs() >= 2**-6
    assert (found.float() == expected.float())[large].float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_in_8_bits_is_as_near_as_the_table_says(dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 64).to(dtype)
    x = torch.randn(2, 7, 96).to(dtype) * torch.logspace(-2, 2, 7)[:, None].to(dtype)
    with torch.no_grad():
        expected = linear.double()(x.double())
        out = Fp8Linear(linear.to(dtype))(x)
    assert out.dtype == dtype and l2(out, expected) < RELATIVE_L2["linear8"]


def test_the_ops_are_registered_well():
    checks = ("test_schema", "test_faketensor")
    q, k, v = tensors(1, 9, 2, 8)
    torch.library.opcheck(OPS.attention8.default, (q, k, v), test_utils=checks)
    weight = quantise_rows(torch.randn(6, 8))
    given = (torch.randn(3, 8), *weight, None)  # the other check multiplies its inputs, which fp8 cannot do
    torch.library.opcheck(OPS.fp8_linear.default, given, test_utils=checks[1:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tier": "fast"}, "unknown tier 'fast': choose one of lossless, high"),
        ({"k": torch.zeros(1, 9, 2, 8, dtype=torch.float16)}, "q is float32, k float16"),
        ({"v": torch.zeros(1, 8, 2, 8)}, r"v must be \[1, 9, 2, 8\] as q"),
    ],
)
def test_bad_attention_is_one_clear_error(change, words):
    given = dict(zip("qkv", tensors(1, 9, 2, 8), strict=True)) | change
    with pytest.raises(ValueError, match=words):
        self_attention(**given)
    if "tier" not in change:
        with pytest.raises(ValueError, match=words):
            self_attention(**given, tier="high")


def test_bad_linear_is_one_clear_error():
    x, (weight, scale) = torch.randn(3, 8), quantise_rows(torch.randn(6, 8))
    with pytest.raises(ValueError, match="does not fit x"):
        fp8_linear(x[:, :4], weight, scale)
    with pytest.raises(ValueError, match="weight8 must be float8_e4m3fn"):
        fp8_linear(x, weight.float(), scale)
    with pytest.raises(ValueError, match=r"weight_scale must be float32 \[6,1\]"):
        fp8_linear(x, weight, scale[:3])
    with pytest.raises(ValueError, match="x is float32, bias bfloat16"):
        fp8_linear(x, weight, scale, torch.zeros(6).bfloat16())
