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
    padding_bias,
    text_attention,
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


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_boxes_are_a_mask_of_concepts_for_each_query(rows, masked, assert_close):
    """Held to the mask of keys, one query at a time."""
    q, tk, tv, k, v, mask = tensors(2, 9, 6, 2, 8, dtype=torch.float64)
    mask = mask if masked else None
    boxes = torch.rand(rows, 9, 3, generator=torch.Generator().manual_seed(1)) < 0.5  # [B or 1,S,N]
    boxes[:, 4], boxes[:, 5] = False, True
    found = concept_injection(q, k, v, mask, boxes)
    both = decoupled_cross_attention(q, tk, tv, k, v, mask, boxes=boxes)
    for query in range(9):
        kept = boxes[:, query].repeat_interleave(2, dim=1).expand(2, -1)  # [B,C]
        kept = kept if mask is None else kept & mask
        one = q[:, query, None]
        assert_close(found[:, query, None], concept_injection(one, k, v, kept), "float64")
        assert_close(both[:, query, None], decoupled_cross_attention(one, tk, tv, k, v, kept), "float64")
    assert not found[:, 4].any() and torch.equal(both[:, 4], attention(q, tk, tv)[:, 4])
    whole = torch.ones_like(boxes)
    assert_close(concept_injection(q, k, v, mask, whole), concept_injection(q, k, v, mask), "float64")


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


@given(
    tokens=st.integers(1, 24),
    counts=st.lists(st.integers(0, 24), min_size=1, max_size=3),
    spare=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_one_key_stands_for_all_padding(tokens, counts, spare, seed):
    """Text whose tokens behind the first n are equal, each row with an n of its own."""
    n = torch.tensor(counts).clamp(max=tokens)
    q, k, v, ck, cv, mask = tensors(len(n), 5, tokens, 2, 8, dtype=torch.float64, seed=seed)
    for row, count in enumerate(n.tolist()):
        for x in (k, v):
            x[row, count:] = x[row, -1:].clone()
    kept = min(int(n.max()) + 1 + spare, tokens)
    bias = padding_bias(n, kept, tokens, torch.float64)
    few_k, few_v = k[:, :kept], v[:, :kept]
    close = {"rtol": 2e-14, "atol": 2e-14}
    torch.testing.assert_close(attention(q, few_k, few_v, bias=bias), attention(q, k, v), **close)
    for concepts in ((ck, cv, None), (ck, cv, mask)):
        full = decoupled_cross_attention(q, k, v, *concepts)
        few = decoupled_cross_attention(q, few_k, few_v, *concepts, text_bias=bias)
        torch.testing.assert_close(few, full, **close)
    # merged: concepts behind the text, in the same softmax
    both = [torch.cat(pair, dim=1) for pair in ((k, ck), (v, cv), (torch.ones_like(mask), mask))]
    kept_both = [torch.cat(pair, dim=1) for pair in ((few_k, ck), (few_v, cv))]
    allowed = torch.cat((torch.ones(len(n), kept, dtype=torch.bool), mask), dim=1)
    bias = torch.nn.functional.pad(bias, (0, mask.shape[1]))
    torch.testing.assert_close(attention(q, *kept_both, allowed, bias), attention(q, *both), **close)


def test_what_stands_behind_the_key_for_padding_changes_no_bit():
    q, k, v, ck, cv, mask = tensors(2, 7, 9, 2, 8)
    bias = padding_bias(torch.tensor([3, 6]), 9, 100)
    behind = bias.isneginf()[:, :, None, None]
    other = torch.where(behind, 1e3, k), torch.where(behind, -1e3, v)
    assert torch.equal(text_attention(q, *other, bias), text_attention(q, k, v, bias))
    full = decoupled_cross_attention(q, k, v, ck, cv, mask, text_bias=bias)
    assert torch.equal(decoupled_cross_attention(q, *other, ck, cv, mask, text_bias=bias), full)
