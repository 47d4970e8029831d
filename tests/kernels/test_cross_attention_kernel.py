"""The kernel in Triton's interpreter against the reference in float64; the op's answers to bad input."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from conceptmaster.kernels import (  # noqa: E402
    absorbed_injection,
    cross_attention,
    cross_attention_plain,
)
from conceptmaster.kernels.cross_attention import (  # noqa: E402
    attention,
    concept_injection,
    decoupled_cross_attention,
    decoupled_cross_attention_reference,
    padding_bias,
    text_attention,
)
from conceptmaster.kernels.cross_attention_plain import cross_attention_triton  # noqa: E402

OPS = torch.ops.conceptmaster
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(batch, queries, text, concepts, heads, width, dtype=torch.float32, seed=0):
    """q, text k and v, concept k and v, mask; the mask's first row is all False, the second ends in False."""
    g = torch.Generator().manual_seed(seed)
    q, *kv = (
        torch.randn(batch, n, heads, width, generator=g, dtype=torch.float64).to(dtype)
        for n in (queries, text, text, concepts, concepts)
    )
    mask = torch.rand(batch, concepts, generator=g) < 0.6
    mask[0] = False
    mask[1:, 0] = True
    mask[1:, 2 * concepts // 3 + 1 :] = False
    return q, *kv, mask


def nan_like(q):
    return torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(2, 67, 33, 3, 2, 12), (2, 130, 70, 150, 1, 128)],  # one tile of concepts, several
    ids=str,
)
def test_decoupled_is_the_reference(shape, dtype, assert_close):
    q, tk, tv, ck, cv, mask = tensors(*shape, dtype=dtype)
    out = cross_attention_triton(nan_like(q), q, (tk, tv), (ck, cv), mask, None)
    wide = (t.double() for t in (q, tk, tv, ck, cv))
    assert_close(out, decoupled_cross_attention_reference(*wide, mask), dtype)


def test_many_queries_take_the_large_tiles(monkeypatch, assert_close):
    q, tk, tv, ck, cv, mask = tensors(2, 200, 5, 3, 1, 16, dtype=torch.float16)
    monkeypatch.setattr(cross_attention_plain, "FEW_QUERIES", 0)
    out = cross_attention_triton(nan_like(q), q, (tk, tv), (ck, cv), mask, None)
    wide = (t.double() for t in (q, tk, tv, ck, cv))
    assert_close(out, decoupled_cross_attention_reference(*wide, mask), "float16")


@pytest.mark.parametrize("concepts", [1, 16, 100])
def test_injection_is_the_reference(concepts, assert_close):
    q, _, _, k, v, mask = tensors(2, 65, 1, concepts, 2, 32)
    for given in (mask, None):
        out = cross_attention_triton(nan_like(q), q, None, (k, v), given, None)
        assert_close(out, attention(*(t.double() for t in (q, k, v)), given))
        assert given is None or out[0].count_nonzero() == 0


BOXED = {  # B, S, T, C, A, E of a tile of concepts, of several, beside text and alone; rows of boxes, dtype
    "one tile": (2, 67, 33, 6, 2, 12, 2, torch.float32),
    "one tile, half": (2, 67, 33, 6, 2, 12, 1, torch.bfloat16),
    "tiles": (2, 70, 7, 99, 1, 32, 1, torch.float16),
    "tiles, full": (2, 67, 7, 99, 1, 32, 2, torch.float32),
    "alone": (2, 67, 0, 6, 2, 12, 1, torch.float32),
    "alone, tiles": (2, 70, 0, 99, 1, 32, 2, torch.float16),
}


@pytest.mark.parametrize("name", BOXED)
def test_boxes_hide_concepts_from_queries(name, assert_close):
    """A query outside of all of them gets exactly the text, exactly zero without any; where they are all of
    the picture the bits are those without."""
    batch, queries, text, concepts, *rest, rows, dtype = BOXED[name]
    q, tk, tv, ck, cv, mask = tensors(batch, queries, max(text, 1), concepts, *rest, dtype=dtype)
    boxes = torch.rand(rows, queries, 3, generator=torch.Generator().manual_seed(3)) < 0.4  # [B or 1,S,N]
    boxes[:, 5:9], boxes[:, 64:66] = False, True
    keys, bias = (tk, tv) if text else None, padding_bias(torch.tensor([0, 5]), text, 60) if text else None

    def run(mask, boxes):
        return cross_attention_triton(nan_like(q), q, keys, (ck, cv), mask, None, bias, boxes)

    wide = [t.double() for t in (q, tk, tv, ck, cv)]
    for given in (mask, None):
        if text:
            more = {"text_bias": bias.double(), "boxes": boxes}
            expected = decoupled_cross_attention_reference(*wide, given, **more)
        else:
            expected = attention(wide[0], *wide[3:], given, boxes=boxes)
        out = run(given, boxes)
        assert_close(out, expected, dtype)
    nothing = run(torch.zeros_like(mask), None) if text else torch.zeros_like(q)
    assert torch.equal(out[:, 5:9], nothing[:, 5:9]) and not torch.equal(out[1], nothing[1])
    assert torch.equal(run(mask, torch.ones_like(boxes)), run(mask, None))
    assert torch.equal(run(None, torch.zeros_like(boxes)), nothing)


@pytest.mark.parametrize("concepts", [1, 32, 40, 64, 70])
def test_as_many_concepts_as_a_word_has_bits(concepts, assert_close):
    """And more, for which on CUDA, too, the reference stands in."""
    q, tk, tv, ck, cv, mask = tensors(2, 20, 7, concepts, 1, 16)
    boxes = torch.rand(1, 20, concepts, generator=torch.Generator().manual_seed(6)) < 0.5
    boxes[:, 3] = False
    more = q, tk, tv, ck, cv, mask, None, None, boxes
    expected = decoupled_cross_attention_reference(*(t.double() for t in more[:5]), *more[5:])
    assert_close(cross_attention._decoupled.cuda(*more), expected)
    alone = cross_attention._injection.cuda(q, ck, cv, mask, boxes)
    assert_close(alone, attention(q.double(), ck.double(), cv.double(), mask, None, boxes))
    assert not alone[:, 3].any()
    weights = absorbed_injection._weights.cuda(q, ck, mask, boxes)
    assert_close(weights, absorbed_injection.concept_weights_reference(q.double(), ck.double(), mask, boxes))


def test_what_a_box_hides_changes_no_bit():
    q, tk, tv, ck, cv, mask = tensors(2, 20, 7, 9, 2, 16)
    boxes = torch.rand(1, 20, 3, generator=torch.Generator().manual_seed(4)) < 0.5
    wider = torch.cat((boxes, ~boxes), dim=2)[..., :3]  # with steps of its own
    assert not wider.is_contiguous()
    out = cross_attention_triton(nan_like(q), q, (tk, tv), (ck, cv), mask, boxes=wider)
    assert torch.equal(out, cross_attention_triton(nan_like(q), q, (tk, tv), (ck, cv), mask, boxes=boxes))
    for concept in range(3):
        other = ck.clone(), cv.clone()
        for keys in other:
            keys[:, 3 * concept : 3 * concept + 3] *= 100
        changed = cross_attention_triton(nan_like(q), q, (tk, tv), other, mask, boxes=boxes)
        same = (changed == out).flatten(2).all(-1)  # [B,S]
        seen = boxes[..., concept] & mask[:, None, 3 * concept : 3 * concept + 3].any(-1)
        assert torch.equal(same, ~seen.expand(2, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", [9, 70])
def test_one_key_stands_for_all_padding(text, dtype, assert_close):
    q, tk, tv, ck, cv, mask = tensors(2, 67, text, 5, 2, 12, dtype=dtype)
    bias = padding_bias(torch.tensor([0, text - 1]), text, 512)
    behind = bias.isneginf()[:, :, None, None]
    tk, tv = torch.where(behind, 1e3, tk), torch.where(behind, 1e3, tv)
    wide = tuple(t.double() for t in (q, tk, tv, ck, cv))
    both = cross_attention_triton(nan_like(q), q, (tk, tv), (ck, cv), mask, text_bias=bias)
    expected = decoupled_cross_attention_reference(*wide, mask, text_bias=bias.double())
    assert_close(both, expected, dtype)
    alone = cross_attention_triton(nan_like(q), q, (tk, tv), None, text_bias=bias)
    assert_close(alone, attention(*wide[:3], bias=bias.double()), dtype)


@pytest.mark.parametrize("concepts", [9, 40])
def test_a_masked_key_changes_no_bit_not_even_as_nan(concepts):
    q, tk, tv, ck, cv, mask = tensors(2, 20, 7, concepts, 2, 16)
    hidden = ~mask[:, :, None, None]
    out = cross_attention_triton(nan_like(q), q, (tk, tv), (ck, cv), mask, None)
    changed = torch.where(hidden, float("nan"), ck), torch.where(hidden, float("nan"), cv)
    assert torch.equal(cross_attention_triton(nan_like(q), q, (tk, tv), changed, mask, None), out)
    alone = cross_attention_triton(nan_like(q), q, (tk, tv), (ck, cv), torch.zeros_like(mask), None)
    assert torch.equal(out[0], alone[0]) and not torch.equal(out[1], alone[1])


def test_strides_are_followed(assert_close):
    # keys and values out of one stacked tensor, queries out of a fused projection, the mask out of a wider
    # one
    q, tk, tv, ck, cv, mask = tensors(2, 20, 7, 9, 2, 16)
    fused = torch.stack((nan_like(q), q), dim=2).flatten(2, 3)[:, :, 2:]  # [B,S,A,E], other stride along S
    text = torch.stack((tk, tv), dim=3).unbind(3)
    concepts = torch.stack((ck, cv), dim=1).unbind(1)
    wider = torch.cat((mask, ~mask), dim=1)[:, :9]
    assert not fused.is_contiguous() and not text[0].is_contiguous() and not wider.is_contiguous()
    out = cross_attention_triton(nan_like(q), fused, text, concepts, wider, None)
    assert torch.equal(out, cross_attention_triton(nan_like(q), q, (tk, tv), (ck, cv), mask, None))


def test_the_queries_norm_is_folded_in(assert_close):
    q, tk, tv, ck, cv, mask = tensors(2, 37, 9, 5, 3, 16)
    weight = 1.0 + 0.1 * torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    flat = (3.0 * q).flatten(2).double()
    normed = torch.nn.functional.rms_norm(flat, (48,), weight.flatten().double(), 1e-6).unflatten(-1, (3, 16))
    expected = decoupled_cross_attention_reference(normed, *(t.double() for t in (tk, tv, ck, cv)), mask)
    rms = (flat.square().mean(-1) + 1e-6).rsqrt().float()  # [B,S]
    text, concepts = (tk * weight, tv), (ck * weight, cv)
    folded = cross_attention_triton(nan_like(q), 3.0 * q, text, concepts, mask, rms)
    assert_close(folded, expected)
    plain = decoupled_cross_attention(3.0 * q, tk * weight, tv, ck * weight, cv, mask, rms)
    assert_close(plain, expected)


def test_the_op_is_registered_well():
    q, tk, tv, ck, cv, mask = tensors(2, 9, 6, 3, 2, 8)
    checks = ("test_schema", "test_faketensor")
    bias = padding_bias(torch.tensor([2, 5]), 6, 20)
    given = (q, tk, tv, ck, cv, mask, None, bias, None)
    torch.library.opcheck(OPS.decoupled_cross_attention.default, given, test_utils=checks)
    torch.library.opcheck(OPS.concept_injection.default, (q, ck, cv, mask, None), test_utils=checks)
    torch.library.opcheck(OPS.biased_attention.default, (q, tk, tv, bias, None), test_utils=checks)
    both = decoupled_cross_attention(q, tk, tv, ck, cv, mask, text_bias=bias)
    assert torch.equal(OPS.decoupled_cross_attention(*given), both)
    assert torch.equal(OPS.biased_attention(q, tk, tv, bias, None), text_attention(q, tk, tv, bias))
    assert torch.equal(OPS.concept_injection(q, ck, cv, None, None), concept_injection(q, ck, cv))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_v": lambda t: t.double()}, "q is float32, text_v float64"),
        ({"concept_k": lambda t: t.to("meta")}, "q is on cpu, concept_k on meta"),
        ({"concept_k": lambda t: t[:, :, :1]}, r"concept_k must be \[2,C,2,8\]"),
        ({"concept_v": lambda t: t[:, :2]}, r"concept_v must be \[2,3,2,8\]"),
        ({"text_k": lambda t: t[:, :0], "text_v": lambda t: t[:, :0]}, "text_k is empty"),
        ({"q": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3)}, "last axis of q is not contiguous"),
        ({"q": lambda t: t[0]}, r"q must be \[B,S,A,E\]"),
        ({"q": lambda t: t.int()}, "q must be floating point"),
        ({"concept_mask": lambda t: t.float()}, "concept_mask must be bool"),
        ({"concept_mask": lambda t: t[:, :2]}, r"concept_mask must be bool \[2,3\]"),
        ({"text_bias": lambda t: t[:, :2]}, r"text_bias must be float32 \[2,6\]"),
        (
            {"boxes": lambda t: torch.ones(2, 8, 3) > 0},
            r"boxes must be bool \[2 or 1,9,N\], not bool \[2, 8, 3\]",
        ),
        (
            {"boxes": lambda t: torch.ones(3, 9, 3) > 0},
            r"boxes must be bool \[2 or 1,9,N\], not bool \[3, 9, 3\]",
        ),
        ({"boxes": lambda t: torch.ones(1, 9, 3)}, "boxes must be bool"),
        ({"boxes": lambda t: torch.ones(1, 9, 2) > 0}, "boxes of 2 concepts do not divide 3 keys"),
    ],
)
def test_bad_input_is_one_clear_error(change, words):
    names = ("q", "text_k", "text_v", "concept_k", "concept_v", "concept_mask")
    given = dict(zip(names, tensors(2, 9, 6, 3, 2, 8), strict=True))
    given |= {"inverse_rms": None, "text_bias": padding_bias(torch.tensor([2, 5]), 6, 20), "boxes": None}
    given |= {name: edit(given[name]) for name, edit in change.items()}
    op = OPS.decoupled_cross_attention
    for call in (decoupled_cross_attention, lambda **named: op(*named.values())):
        with pytest.raises(ValueError, match=words) as caught:
            call(**given)
        assert "\n" not in str(caught.value)
