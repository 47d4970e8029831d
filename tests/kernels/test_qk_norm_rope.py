"""The fused norm and rotary embedding in Triton's interpreter against float64, and against the engine's
parts.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from conceptmaster.kernels.qk_norm_rope import (  # noqa: E402
    inverse_rms,
    inverse_rms_triton,
    qk_norm_rope,
    qk_norm_rope_triton,
)

OPS = torch.ops.conceptmaster


def tensors(batch, tokens, heads, width, dtype=torch.float32, seed=0):
    """q and k [B,S,D], their weights [D], cos and sin of random angles [S,1,E/2]."""
    g = torch.Generator().manual_seed(seed)
    q, k = (3 * torch.randn(batch, tokens, heads * width, generator=g).to(dtype) for _ in range(2))
    weights = (1 + 0.2 * torch.randn(heads * width, generator=g).to(dtype) for _ in range(2))
    angles = 10 * torch.rand(tokens, 1, width // 2, generator=g)
    return q, k, *weights, angles.cos(), angles.sin()


def run(given, eps=1e-6):
    q, cos = given[0], given[4]
    shape = (*q.shape[:2], -1, 2 * cos.shape[-1])
    outs = [torch.full(q.shape, float("nan"), dtype=q.dtype).reshape(shape) for _ in range(2)]
    qk_norm_rope_triton(*outs, *given, eps)
    return outs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 3, 12), (1, 7, 12, 32), (1, 3, 12, 128)], ids=str)
def test_the_kernel_is_the_reference(shape, dtype, assert_close):
    given = tensors(*shape, dtype=dtype)
    expected = qk_norm_rope(*(t.double() for t in given))
    for out, right in zip(run(given), expected, strict=True):
        assert_close(out, right, dtype)


def test_it_is_what_a_block_computes(assert_close):
    from conceptmaster.engine.blocks import Attention
    from conceptmaster.engine.positions import rotary_tables
    from conceptmaster.engine.presets import preset
    from conceptmaster.kernels.qk_norm_rope import rotate

    config = preset("sprites").transformer
    cos, sin = rotary_tables(config, np.indices((2, 3, 2)).reshape(3, -1).T)
    attention = Attention(config.width, config.num_attention_heads, config.eps)
    torch.nn.init.normal_(attention.norm_q.weight)
    x = torch.randn(2, 12, config.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = rotate(attention.queries(x), cos, sin), rotate(attention.keys_values(x)[0], cos, sin)
        projected = attention.to_q(x), attention.to_k(x)
        given = (*projected, attention.norm_q.weight, attention.norm_k.weight, cos, sin)
        found = qk_norm_rope(*given, config.eps)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for out, right in zip(run([t.detach() for t in given], config.eps), expected, strict=True):
        assert_close(out, right)


def test_rows_of_a_fused_projection_are_followed():
    q, k, *rest = tensors(2, 5, 3, 12)
    fused = torch.cat((q, k, q), dim=-1).chunk(3, dim=-1)
    assert not fused[1].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(run((*fused[:2], *rest)), run((q, k, *rest)), strict=True))


def test_inverse_rms(assert_close):
    x = 5 * torch.randn(2, 7, 200, generator=torch.Generator().manual_seed(0))[..., :100]
    out = torch.full((2, 7), float("nan"))
    assert_close(inverse_rms_triton(out, x, 1e-6), (x.double().square().mean(-1) + 1e-6).rsqrt())
    assert_close(inverse_rms(x), out)
    assert_close(x * out[:, :, None], torch.nn.functional.rms_norm(x, (100,), eps=1e-6))


def test_the_ops_are_registered_well():
    checks = ("test_schema", "test_faketensor")
    given = tensors(2, 5, 3, 12)
    torch.library.opcheck(OPS.qk_norm_rope.default, (*given, 1e-6), test_utils=checks)
    torch.library.opcheck(OPS.inverse_rms.default, (given[0], 1e-6), test_utils=checks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": lambda t: t.half()}, "q is float32, k float16"),
        ({"k": lambda t: t[:, :3]}, r"k must be \[2,5,36\]"),
        ({"q": lambda t: t[0]}, r"q must be \[B,S,D\]"),
        ({"k_weight": lambda t: t[:5]}, r"k_weight must be \[36\]"),
        ({"cos": lambda t: t[:3]}, r"cos must be float32 \[5,1,R\]"),
        ({"sin": lambda t: t[..., :5]}, r"sin must be float32 \[5,1,6\], not float32 \[5, 1, 5\]"),
        ({"sin": lambda t: t.half()}, r"sin must be float32 \[5,1,6\], not float16"),
        ({"cos": lambda t: t.repeat(1, 1, 2)[..., ::2]}, "cos is not contiguous"),
    ],
)
def test_bad_input_is_one_clear_error(change, words):
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin")
    given = dict(zip(names, tensors(2, 5, 3, 12), strict=True))
    given |= {name: edit(given[name]) for name, edit in change.items()}
    for call in (qk_norm_rope, lambda **named: OPS.qk_norm_rope(*named.values(), 1e-6)):
        with pytest.raises(ValueError, match=words):
            call(**given)
