"""The folded injector against the engine's, and its kernel in Triton's interpreter against float64."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from conceptmaster.kernels.absorbed_injection import (  # noqa: E402
    absorbed_injection,
    absorbed_values,
    absorbing_wins,
    concept_weights,
    concept_weights_triton,
)
from conceptmaster.kernels.cross_attention import concept_injection  # noqa: E402

OPS = torch.ops.conceptmaster


def tensors(batch, tokens, concepts, heads, width, dtype=torch.float32, seed=0):
    """q, k, v and a mask whose first row is all False."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, heads, width, generator=g).to(dtype) for n in (tokens, concepts, concepts)
    )
    mask = torch.rand(batch, concepts, generator=g) < 0.6
    mask[0], mask[1:, 0] = False, True
    return q, k, v, mask


def run(q, k, *masks):
    out = torch.full((*q.shape[:2], q.shape[2] * k.shape[1]), float("nan"), dtype=q.dtype)
    return concept_weights_triton(out, q, k, *masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 67, 3, 2, 12), (2, 20, 5, 3, 24), (2, 70, 100, 1, 128)], ids=str)
def test_the_kernel_is_the_reference(shape, dtype, assert_close):
    q, k, _, mask = tensors(*shape, dtype=dtype)
    wide = q.double(), k.double()
    out = run(q, k, mask)
    assert_close(out, concept_weights(*wide, mask), dtype)
    assert out[0].count_nonzero() == 0
    assert_close(run(q, k, None), concept_weights(*wide), dtype)


@pytest.mark.parametrize(
    ("shape", "rows", "dtype"),
    [((2, 67, 6, 2, 12), 1, torch.float32), ((2, 70, 102, 1, 32), 2, torch.bfloat16)],
    ids=str,
)
def test_boxes_hide_concepts_from_tokens(shape, dtype, rows, assert_close):
    q, k, v, mask = tensors(*shape, dtype=dtype)
    boxes = torch.rand(rows, shape[1], 3, generator=torch.Generator().manual_seed(5)) < 0.5
    boxes[:, :9] = False
    for given in (mask, None):
        weights = run(q, k, given, boxes)
        assert_close(weights, concept_weights(q.double(), k.double(), given, boxes), dtype)
        assert not weights[:, :9].any()
    by_key = weights.unflatten(2, (shape[3], 3, -1)).amax((2, 4)) > 0  # [B,S,N]
    assert torch.equal(by_key, boxes.expand(2, -1, -1))  # of each concept inside something, outside nothing
    assert torch.equal(run(q, k, mask, torch.ones_like(boxes)), run(q, k, mask))
    x, wide = torch.zeros(2, shape[1], shape[3] * shape[4]).double(), (q.double(), k.double())
    values = absorbed_values(v.double(), torch.eye(x.shape[2]).double())
    expected = concept_injection(*wide, v.double(), mask, boxes).flatten(2)
    assert_close(absorbed_injection(x, *wide, values, mask, boxes), expected, "float64")


def test_what_a_masked_key_holds_changes_no_bit():
    q, k, _, mask = tensors(2, 20, 9, 2, 16)
    changed = torch.where(mask[:, :, None, None], k, float("nan"))
    assert torch.equal(run(q, k, mask), run(q, changed, mask))


def test_folding_the_output_gives_the_injector(assert_close):
    q, k, v, mask = tensors(2, 11, 5, 3, 8, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 11, 24, generator=g).double(), torch.randn(24, 24, generator=g).double()
    expected = x + concept_injection(q, k, v, mask).flatten(2) @ weight.T
    before = x.clone()
    assert absorbed_injection(x, q, k, absorbed_values(v, weight), mask) is x
    assert_close(x, expected, "float64")
    assert torch.equal(x[0], before[0])


def test_it_is_the_engines_injector(assert_close):
    from conceptmaster.engine.blocks import Injector

    injector = Injector(24, 3, 1e-6, 10)
    torch.nn.init.normal_(injector.to_out.weight)
    g = torch.Generator().manual_seed(2)
    x, concepts = torch.randn(2, 11, 24, generator=g), torch.randn(2, 5, 10, generator=g)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    with torch.no_grad():
        k, v = injector.keys_values(concepts)
        q = injector.norm_q(injector.to_q(injector.norm(x))).unflatten(-1, (3, 8))
        expected = x + injector(x, k, v, mask)
        assert_close(absorbed_injection(x, q, k, absorbed_values(v, injector.to_out.weight), mask), expected)


def test_when_folding_wins():
    assert absorbing_wins(64, 12, 128) and not absorbing_wins(256, 12, 128)
    assert absorbing_wins(139, 12, 128) and not absorbing_wins(140, 12, 128)  # 12 * 140 = 1536 + 144


def test_the_op_is_registered_well():
    q, k, _, mask = tensors(2, 9, 3, 2, 8)
    torch.library.opcheck(
        OPS.concept_weights.default, (q, k, mask, None), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": lambda t: t.half()}, "q is float32, k float16"),
        ({"k": lambda t: t[:, :, :1]}, r"k must be \[2,C,2,8\]"),
        ({"mask": lambda t: t[:, :2]}, r"mask must be bool \[2,3\]"),
        ({"q": lambda t: t[0]}, r"q must be \[B,S,A,E\]"),
    ],
)
def test_bad_input_is_one_clear_error(change, words):
    q, k, _, mask = tensors(2, 9, 3, 2, 8)
    given = {"q": q, "k": k, "mask": mask, "boxes": None}
    given |= {name: edit(given[name]) for name, edit in change.items()}
    for call in (concept_weights, lambda **named: OPS.concept_weights(*named.values())):
        with pytest.raises(ValueError, match=words):
            call(**given)


def test_too_many_concept_tokens_for_the_kernel_are_told():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = (torch.empty(2, n, 2, 8, device="cuda") for n in (9, 257))
        with pytest.raises(ValueError, match="concept_weights: on CUDA C is 256 at most, not 257"):
            concept_weights(q, k)
