from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.kernels.cross_attention import attention  # noqa: E402
from conceptmaster.kernels.self_attention import self_attention  # noqa: E402


def tensors():
    """q, k, v [B,S,A,E]."""
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 40, 2, 16, generator=g) for _ in range(3))


def test_it_is_attention(assert_close):
    q, k, v = tensors()
    assert_close(self_attention(q, k, v), attention(q.double(), k.double(), v.double()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(2, 40, 2, 16, dtype=torch.float16)}, "q is float32, k float16"),
        ({"v": torch.zeros(2, 39, 2, 16)}, r"v must be \[2,40,2,16\], not"),
    ],
)
def test_bad_input_is_one_clear_error(change, words):
    with pytest.raises(ValueError, match=words):
        self_attention(**dict(zip("qkv", tensors(), strict=True)) | change)
