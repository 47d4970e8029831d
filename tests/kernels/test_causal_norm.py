"""What stands before a causal convolution, in Triton's interpreter against float64."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from conceptmaster.kernels.causal_norm import causal_norm, causal_norm_triton  # noqa: E402


def tensors(frames, positions, channels, seen=2, dtype=torch.float32):
    """x, before, weight, bias, residual."""
    g = torch.Generator().manual_seed(0)
    shapes = (frames, positions, channels), (seen, positions, channels), (channels,), (channels,)
    x, before, weight, bias = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return x, before, weight, bias, torch.randn(x.shape, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("left_out", [(), (2,), (4,), (3, 4), (2, 3, 4)], ids=str)
def test_the_kernel_is_the_reference(left_out, dtype, assert_close):
    """Without the norm, the residual, bias and residual, all of them; odd sizes, one frame and several."""
    for frames, positions, channels, seen in ((1, 5, 12, 2), (3, 67, 96, 2), (2, 3, 20, 1)):
        given = [
            None if place in left_out else tensor
            for place, tensor in enumerate(tensors(frames, positions, channels, seen, dtype))
        ]
        x, before = given[:2]
        summed, ahead, following = (
            torch.full((count, positions, channels), float("nan"), dtype=dtype)
            for count in (frames, frames + seen, seen)
        )
        causal_norm_triton(summed, ahead, following, *given)
        exact = [t if t is None else t.double() for t in given]
        total = exact[0] + sum(t for t in exact[3:] if t is not None)
        assert_close(summed, total, dtype)
        # the norm is of what was written, so that a rounded sum does not count as an error of the norm
        assert_close(ahead, causal_norm(summed.double(), exact[1], exact[2])[1], dtype)
        assert torch.equal(ahead[:seen], before) and torch.equal(following, ahead[-seen:])
        kept = torch.full_like(ahead, float("nan"))
        causal_norm_triton(None, kept, following, *given)
        assert torch.equal(kept, ahead)


def test_it_is_what_diffusers_computes(assert_close):
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    x, before, weight, bias, residual = (t.double() for t in tensors(3, 10, 16))
    norm = WanRMS_norm(16, images=False).double()
    norm.gamma.data = weight.view(-1, 1, 1, 1)
    summed, ahead, following = causal_norm(x, before, weight, bias, residual, keep=True)
    expected = torch.nn.functional.silu(norm((x + bias + residual).permute(2, 0, 1)[None, ..., None]))
    assert_close(ahead[2:], expected[0, ..., 0].permute(1, 2, 0), "float64")
    assert torch.equal(summed, x + bias + residual) and torch.equal(following, ahead[3:])
    assert following.untyped_storage().data_ptr() != ahead.untyped_storage().data_ptr()
    assert causal_norm(torch.zeros_like(x), before, weight)[1].isfinite().all()


def test_the_op_is_registered_well():
    op = torch.ops.conceptmaster.causal_norm.default
    for keep in (True, False):
        given = (*tensors(3, 5, 16), keep)
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: lambda t: t[0]}, r"x must be \[F,S,C\]"),
        ({1: lambda t: t[:, :3]}, r"before must be \[G,5,16\]"),
        ({2: lambda t: t.half()}, "x is float32, weight float16"),
        ({4: lambda t: t[:1]}, r"residual must be \[3,5,16\]"),
        ({0: lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)}, "must be contiguous"),
    ],
)
def test_bad_input_is_one_clear_error(change, words):
    given = list(tensors(3, 5, 16))
    for place, edit in change.items():
        given[place] = edit(given[place])
    for call in (causal_norm, lambda *found: torch.ops.conceptmaster.causal_norm(*found, False)):
        with pytest.raises(ValueError, match=words):
            call(*given)
