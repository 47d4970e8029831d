from __future__ import annotations

import io

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from conceptmaster.kernels.cross_attention import (  # noqa: E402
    attention,
    concept_injection,
    decoupled_cross_attention,
)

SHAPES = [(1, 1, 1, 1, 2), (2, 5, 3, 2, 8), (1, 67, 33, 3, 12), (3, 16, 130, 1, 32)]  # B, S, T, A, E


def tensors(batch, queries, keys, heads, width, dtype=torch.float32, seed=0):
    """q, k, v, k2, v2, and a mask that leaves each batch row at least one key."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, heads, width) for n in (queries, keys, keys, keys, keys)]
    mask = torch.rand(batch, keys, generator=g) < 0.5
    mask[:, seed % keys] = True
    return *(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes), mask


def by_hand(q, k, v, mask=None):
    """Softmax attention written out: one batch row at a time, masked keys taken out."""
    rows = []
    for i in range(q.shape[0]):
        kept = slice(None) if mask is None else mask[i]
        scores = torch.einsum("sae,tae->ast", q[i], k[i][kept]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("ast,tae->sae", scores.softmax(-1), v[i][kept]))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_softmax_over_the_kept_keys(shape, dtype, assert_close):
    q, k, v, _, _, mask = tensors(*shape, dtype=dtype)
    assert_close(attention(q, k, v), by_hand(q, k, v), dtype)
    assert_close(attention(q, k, v, mask), by_hand(q, k, v, mask), dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_decoupled_is_the_sum_of_two_attentions(shape, assert_close):
    q, tk, tv, ck, cv, mask = tensors(*shape, dtype=torch.float64)
    expected = by_hand(q, tk, tv) + by_hand(q, ck, cv, mask)
    assert_close(decoupled_cross_attention(q, tk, tv, ck, cv, mask), expected, "float64")
    expected = by_hand(q, tk, tv) + by_hand(q, ck, cv)
    assert_close(decoupled_cross_attention(q, tk, tv, ck, cv), expected, "float64")


@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    heads=st.integers(1, 3),
    width=st.sampled_from([2, 8, 12]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_what_a_masked_key_holds_changes_no_bit(batch, queries, keys, heads, width, seed):
    q, k, v, k2, v2, mask = tensors(batch, queries, keys, heads, width, seed=seed)
    hidden = ~mask[:, :, None, None]
    k2, v2 = torch.where(hidden, 1e3 * k2, k), torch.where(hidden, 1e3 * v2, v)
    assert torch.equal(concept_injection(q, k, v, mask), concept_injection(q, k2, v2, mask))
    changed = decoupled_cross_attention(q, k, v, k2, v2, mask)
    assert torch.equal(decoupled_cross_attention(q, k, v, k, v, mask), changed)


def test_a_row_without_keys_is_exactly_zero_and_leaves_the_others_alone():
    q, k, v, k2, v2, mask = tensors(3, 7, 5, 2, 8)
    mask[1] = False
    out = concept_injection(q, k, v, mask)
    assert out[1].count_nonzero() == 0
    assert torch.equal(out[[0, 2]], concept_injection(q[[0, 2]], k[[0, 2]], v[[0, 2]], mask[[0, 2]]))
    both = decoupled_cross_attention(q, k2, v2, k, v, mask)
    assert torch.equal(both[1], attention(q, k2, v2)[1])


def test_gradients_are_finite_and_zero_where_masked():
    q, k, v, _, _, mask = tensors(3, 7, 5, 2, 8)
    mask[1] = False
    for tensor in (q, k, v):
        tensor.requires_grad_()
    concept_injection(q, k, v, mask).square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v))
    for tensor in (k, v):
        assert tensor.grad[~mask].count_nonzero() == 0
        assert tensor.grad[mask].count_nonzero() > 0


@pytest.mark.parametrize("opset", [20, 23])
def test_the_same_holds_in_onnx_runtime(opset, assert_close):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")

    class Both(torch.nn.Module):
        def forward(self, q, tk, tv, ck, cv, mask):
            return concept_injection(q, ck, cv, mask), decoupled_cross_attention(q, tk, tv, ck, cv, mask)

    q, tk, tv, ck, cv, mask = tensors(2, 9, 6, 2, 8)
    mask[0] = False
    file = io.BytesIO()
    program = torch.onnx.export(
        Both().eval(), (q, tk, tv, ck, cv, mask), dynamo=True, opset_version=opset, verbose=False
    )
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*values):
        return session.run(None, dict(zip(names, (value.numpy() for value in values), strict=True)))

    injection, both = run(q, tk, tv, ck, cv, mask)
    assert_close(injection, concept_injection(q, ck, cv, mask))
    assert_close(both, decoupled_cross_attention(q, tk, tv, ck, cv, mask))
    assert not injection[0].any()
    hidden = ~mask[:, :, None, None]
    changed = run(q, tk, tv, torch.where(hidden, 1e3, ck), torch.where(hidden, -1e3, cv), mask)
    assert (changed[0] == injection).all() and (changed[1] == both).all()
