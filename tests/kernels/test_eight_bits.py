"""The linear layer in 8 bits, in Triton's interpreter: against its own reference, and the exact result."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from conceptmaster.kernels.fp8_linear import (  # noqa: E402
    Fp8Linear,
    Quantised,
    fp8_linear,
    quantise_rows,
    quantise_rows_triton,
)
from conceptmaster.kernels.tolerances import RELATIVE_L2  # noqa: E402

OPS = torch.ops.conceptmaster


def l2(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


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


def test_gelu_and_quantising_in_one(assert_close):
    x = 4 * torch.randn(5, 200, generator=torch.Generator().manual_seed(0))[:, :100]
    out = torch.empty(5, 100, dtype=torch.float8_e4m3fn), torch.full((5, 1), float("nan"))
    found, scale = quantise_rows_triton(*out, x, gelu=True)
    right = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert_close(scale[:, 0], right.abs().amax(-1) / 448)
    assert l2(found.float() * scale, right) < RELATIVE_L2["linear8"]
    assert l2(quantise_rows(x, gelu=True).values.float() * scale, right) < RELATIVE_L2["linear8"]


def test_a_layer_behind_a_gelu_and_one_of_what_is_quantised():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(96, 64), torch.randn(2, 7, 96)
    with torch.no_grad():
        right = linear(torch.nn.functional.gelu(x, approximate="tanh"))
        assert l2(Fp8Linear(linear, gelu=True)(x), right) < RELATIVE_L2["linear8"]
        layer = Fp8Linear(linear)
        assert torch.equal(layer.product(quantise_rows(x), x.dtype), layer(x))
        eighth = torch.tensor([0.125])
        found = layer.product(Quantised((x / eighth).to(torch.float8_e4m3fn), eighth), x.dtype)
        assert l2(found, linear(x)) < RELATIVE_L2["linear8"]


def test_the_op_is_registered_well():
    weight = quantise_rows(torch.randn(6, 8))
    given = (
        torch.randn(3, 8),
        *weight,
        None,
        True,
        False,
    )  # "test_schema" multiplies its inputs, which fp8 cannot do
    torch.library.opcheck(OPS.fp8_linear.default, given, test_utils="test_faketensor")


def test_bad_linear_is_one_clear_error():
    x, (weight, scale) = torch.randn(3, 8), quantise_rows(torch.randn(6, 8))
    with pytest.raises(ValueError, match=r"weight8 must be float8_e4m3fn \[O,4\]"):
        fp8_linear(x[:, :4], weight, scale)
    with pytest.raises(ValueError, match="weight8 must be float8_e4m3fn"):
        fp8_linear(x, weight.float(), scale)
    with pytest.raises(ValueError, match=r"weight_scale must be float32 \[6,1\]"):
        fp8_linear(x, weight, scale[:3])
    with pytest.raises(ValueError, match="x is float32, bias bfloat16"):
        fp8_linear(x, weight, scale, torch.zeros(6).bfloat16())
