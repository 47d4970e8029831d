"""The fused residual, LayerNorm and modulation in Triton's interpreter against float64 and against the
engine.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from conceptmaster.kernels.modulate import modulate, modulate_triton, residual, residual_modulate  # noqa: E402

OPS = torch.ops.conceptmaster


def tensors(batch, tokens, width, dtype=torch.float32, seed=0):
    """x and branch [B,S,D] in dtype, far from mean zero; gate, scale, shift [B,D] as slices of a table."""
    g = torch.Generator().manual_seed(seed)
    x, branch = (torch.randn(batch, tokens, width, generator=g).to(dtype) for _ in range(2))
    table = torch.randn(batch, 3, width, generator=g) * 0.5
    return 2 * x + 1, branch, *table.unbind(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 12), (1, 3, 200), (2, 2, 1536)], ids=str)
def test_the_kernel_is_the_reference(shape, dtype, assert_close):
    x, branch, gate, scale, shift = tensors(*shape, dtype=dtype)
    out, summed = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    modulate_triton(out, summed, x, branch, gate, scale, shift, True, 1e-6)
    wide = [t.double() for t in (x, branch, gate, scale, shift)]
    expected = wide[0] + wide[1] * wide[2][:, None]
    assert_close(summed, expected, dtype)
    # the norm is of what was written, so that a rounded sum does not count as an error of the norm
    assert_close(out, modulate(summed.double(), wide[3], wide[4]), dtype)


def test_without_branch_gate_or_shift(assert_close):
    x, branch, gate, scale, _ = tensors(2, 5, 40)
    out, summed = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    modulate_triton(out, None, x, None, None, scale[:1], None, False, 1e-5)
    assert_close(out, modulate(x.double(), scale[:1].double(), plus_one=False, eps=1e-5))
    modulate_triton(out, summed, x, branch, None, scale, None, True, 1e-6)
    assert_close(summed, x.double() + branch.double())
    assert_close(out, modulate(x.double() + branch.double(), scale.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_later_is_not_normalised(dtype, assert_close):
    x, branch, gate, scale, shift = tensors(2, 5, 40, dtype)
    later = torch.randn(40, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for added in (None, later):
        out, summed = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
        modulate_triton(out, summed, x, branch, gate, scale, shift, True, 1e-6, added)
        results.append((summed, out))
    assert torch.equal(results[0][1], results[1][1])
    expected = x.double() + branch.double() * gate.double()[:, None] + later.double()
    assert_close(results[1][0], expected, str(dtype).removeprefix("torch."))
    wide = [t.double() for t in (x, branch, gate, scale, shift, later)]
    (carried, h), plain = residual_modulate(*wide), residual_modulate(*wide[:5])
    assert_close(carried, expected, "float64")
    assert torch.equal(h, plain[1])


@pytest.mark.parametrize("rows", [1, 2])
def test_runs_of_tokens_have_vectors_of_their_own(rows, assert_close):
    """Three latent frames of two tokens: what each frame would give alone; the same vectors for both rows of
    the batch, or each its own; and an affine norm's, which is of all."""
    x, branch, *_ = tensors(2, 6, 40)
    gate, scale, shift = torch.randn(3, rows, 3, 40, generator=torch.Generator().manual_seed(2)).unbind(0)
    found = modulate(x, scale, shift), *residual_modulate(x, branch, gate, scale, shift)
    affine = residual_modulate(x, branch, gate, scale[:1, 0], shift[:1, 0], branch[0, 0], plus_one=False)
    alone = residual(x, branch, gate)
    for frame in range(3):
        at, own = slice(2 * frame, 2 * frame + 2), [v[:, frame] for v in (gate, scale, shift)]
        here, added = x[:, at], branch[:, at]
        expected = modulate(here, *own[1:]), *residual_modulate(here, added, *own)
        for a, b in zip(found, expected, strict=True):
            assert_close(a[:, at], b)
        assert_close(alone[:, at], expected[1])
        norm = scale[:1, 0], shift[:1, 0], branch[0, 0]
        for a, b in zip(affine, residual_modulate(here, added, own[0], *norm, plus_one=False), strict=True):
            assert_close(a[:, at], b)


def test_strides_are_followed():
    x, branch, gate, scale, shift = tensors(2, 5, 16)
    apart = torch.stack((x, branch), dim=2).unbind(2)
    assert not apart[0].is_contiguous() and not gate.is_contiguous()
    results = []
    for given in ((x, branch, gate.clone(), scale.clone(), shift.clone()), (*apart, gate, scale, shift)):
        out, summed = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
        modulate_triton(out, summed, *given, True, 1e-6)
        results.append((out, summed))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_a_block_computes(dtype):
    from conceptmaster.engine.layers import WideLayerNorm

    x, out, gate, scale, shift = tensors(2, 5, 16, dtype=dtype)
    norm = WideLayerNorm(16, 1e-6, elementwise_affine=False)
    affine = WideLayerNorm(16, 1e-6)
    torch.nn.init.normal_(affine.weight)
    torch.nn.init.normal_(affine.bias)
    with torch.no_grad():
        carried = (x.float() + out * gate[:, None]).type_as(x)
        h = (norm(carried) * (1 + scale[:, None]) + shift[:, None]).type_as(x)
        found = residual_modulate(x, out, gate, scale, shift)
        assert torch.equal(found[0], carried) and torch.equal(found[1], h)
        vectors = affine.weight[None], affine.bias[None]
        expected = affine(x).type_as(x)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # one rounding of float32, or of bfloat16
        torch.testing.assert_close(
            modulate(x, *vectors, plus_one=False), expected, rtol=tolerance, atol=tolerance
        )


def test_the_ops_are_registered_well():
    x, branch, gate, scale, shift = tensors(2, 5, 16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.modulate.default, (x, scale, shift, True, 1e-6), test_utils=checks)
    given = (x, branch, gate, scale, None, branch[0, 0], False, 1e-6)
    torch.library.opcheck(OPS.residual_modulate.default, given, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"branch": lambda t: t.half()}, "x is float32, branch float16"),
        ({"branch": lambda t: t[:1]}, r"branch must be \[2,5,16\]"),
        ({"scale": lambda t: t.half()}, r"scale must be float32 \[2 or 1,16\], not float16"),
        ({"shift": lambda t: t[:, :3]}, r"shift must be float32 \[2 or 1,16\]"),
        ({"gate": lambda t: t.to("meta")}, "x is on cpu, gate on meta"),
        ({"x": lambda t: t[0]}, r"x must be \[B,S,D\]"),
        ({"x": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)}, "last axis of x is not contiguous"),
    ],
)
def test_bad_input_is_one_clear_error(change, words):
    given = dict(zip(("x", "branch", "gate", "scale", "shift"), tensors(2, 5, 16), strict=True))
    given |= {name: edit(given[name]) for name, edit in change.items()}
    for call in (residual_modulate, lambda **named: OPS.residual_modulate(*named.values(), None, True, 1e-6)):
        with pytest.raises(ValueError, match=words):
            call(**given)
