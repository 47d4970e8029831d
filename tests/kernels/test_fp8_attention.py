"""Attention in 8 bits: the quantising kernels in Triton's interpreter against their reference, the reference
against the exact result, and cuDNN's part with a package that is not there, or made up.
"""

from __future__ import annotations

import types

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from conceptmaster.kernels import fp8_attention as eight  # noqa: E402
from conceptmaster.kernels.cross_attention import attention  # noqa: E402
from conceptmaster.kernels.fp8_attention import (  # noqa: E402
    fp8_attention,
    qkv_to_fp8,
    qkv_to_fp8_triton,
    query_key_steps,
)
from conceptmaster.kernels.qk_norm_rope import qk_norm_rope  # noqa: E402
from conceptmaster.kernels.tolerances import RELATIVE_L2  # noqa: E402

OPS = torch.ops.conceptmaster


def tensors(batch, tokens, heads, width, dtype=torch.float32, offset=0.0):
    """q, k, v [B,S,D], as parts of one product; the norms' weights [D]; cos and sin [S,1,E/2]."""
    g = torch.Generator().manual_seed(0)
    total = heads * width
    qkv = torch.randn(batch, tokens, 3 * total, generator=g)
    qkv[..., total : 2 * total] += offset * torch.randn(total, generator=g)
    weights = [(1 + 0.2 * torch.randn(total, generator=g)).to(dtype) for _ in range(2)]
    angles = torch.rand(tokens, 1, width // 2, generator=g)
    return (*qkv.to(dtype).chunk(3, dim=-1), *weights, angles.cos(), angles.sin())


def exact(given):
    """Of the same in float64: [B,S,A,E]."""
    q, k, v, *rest = (x.double() for x in given)
    q, k = qk_norm_rope(q, k, *rest)
    return attention(q, k, v.unflatten(-1, q.shape[2:]))


def relative_l2(found, right):
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (1, 70, 2, 32), (1, 3, 12, 128)], ids=str)
def test_the_kernels_are_the_reference(shape, dtype, assert_close):
    given = tensors(*shape, dtype=dtype, offset=1.0)
    steps = query_key_steps(*given[3:5])
    nan = torch.full(shape, float("nan"))
    outs = [nan.to(torch.float8_e4m3fn) for _ in range(3)]
    found = qkv_to_fp8_triton(*outs, torch.full((4,), float("nan")), *given, steps, 1e-6)
    right = qkv_to_fp8(*given, steps)
    assert_close(found[3], right[3], dtype)
    for out, expected in zip(found[:3], right[:3], strict=True):
        assert not out.float().isnan().any()
        error = (out.float() - expected.float()).abs()
        # a value near the middle between two may go either way; it is then one step of 1/8 off
        assert (error <= expected.float().abs() / 7 + 2**-6).all()
        assert (error > 2**-6).float().mean() < (1e-2 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("shape", [(2, 80, 3, 16), (1, 200, 2, 128)], ids=str)
def test_it_is_as_near_as_the_table_says(shape):
    given = tensors(*shape)
    out, scale = fp8_attention(*qkv_to_fp8(*given, query_key_steps(*given[3:5])))
    assert out.dtype == torch.float8_e4m3fn and out.shape == shape and out.is_contiguous()
    assert relative_l2(out.float() * scale, exact(given)) < RELATIVE_L2["attention8"]


def test_what_all_keys_have_in_common_costs_nothing():
    given = tensors(1, 200, 2, 128, offset=8.0)
    out, scale = fp8_attention(*qkv_to_fp8(*given, query_key_steps(*given[3:5])))
    assert relative_l2(out.float() * scale, exact(given)) < RELATIVE_L2["attention8"]


def test_no_input_is_too_large():
    given = list(tensors(1, 40, 2, 16))
    given[0] = torch.zeros_like(given[0])
    given[0][..., 5] = 1e4  # the norm gives it all of sqrt(D)
    given[1], given[2] = 1e6 * given[1], 1e6 * given[2]
    steps = query_key_steps(*given[3:5])
    q8, k8, v8, found = qkv_to_fp8(*given, steps)
    assert 200 < q8.float().abs().amax() <= 448
    assert v8.float().abs().amax() == 416
    assert relative_l2(fp8_attention(q8, k8, v8, found)[0].float() * found[2], exact(given)) < 0.1


def test_the_op_is_registered_well():
    given = tensors(2, 5, 3, 16)
    arguments = (*given, query_key_steps(*given[3:5]), 1e-6)
    torch.library.opcheck(OPS.qkv_to_fp8.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (2, torch.zeros(2, 4, 48), r"qkv_to_fp8: v must be \[2,5,48\], not \[2, 4, 48\]"),
        (7, torch.zeros(3), r"qkv_to_fp8: qk_steps must be float32 \[2\]"),
    ],
)
def test_bad_input_is_one_clear_error(place, value, words):
    given = [*tensors(2, 5, 3, 16), torch.ones(2)]
    given[place] = value
    with pytest.raises(ValueError, match=words):
        qkv_to_fp8(*given)


@pytest.fixture
def gpu(monkeypatch):
    """Forgets what was found out before, and pretends to a Hopper; the package is what the test says."""
    caches = (eight.cudnn, eight._why_not, eight.cudnn_attends)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def said(monkeypatch, caplog, module, self_test=0.01):
    """What the log says where the package is `module`: the lines."""

    def load(name):
        if isinstance(module, Exception):
            raise module
        return module

    def test(device):
        if isinstance(self_test, Exception):
            raise self_test
        return self_test

    monkeypatch.setattr(eight.importlib, "import_module", load)
    monkeypatch.setattr(eight, "_self_test", test)
    monkeypatch.setattr(eight, "_graph", lambda index, shape: None)
    found = [eight.cudnn_attends(torch.device("cuda", 0), (1, 40, 2, 128)) for _ in range(2)]
    assert found[0] == found[1] == (not caplog.records)
    return [record.getMessage() for record in caplog.records]


def package(version="1.24.1"):
    return types.SimpleNamespace(__version__=version, backend_version=lambda: 91900)


@pytest.mark.parametrize(
    ("module", "self_test", "words"),
    [
        (
            ModuleNotFoundError("no", name="cudnn"),
            0.01,
            "nvidia-cudnn-frontend is not installed: in the project",
        ),
        (
            OSError("libcudnn.so.9:\nno file"),
            0.01,
            "nvidia-cudnn-frontend does not load (libcudnn.so.9: no file)",
        ),
        (package("1.9.0"), 0.01, "nvidia-cudnn-frontend is 1.9.0, 1.24 or newer, below 2.0 is needed"),
        (package("2.0.0"), 0.01, "nvidia-cudnn-frontend is 2.0.0, 1.24 or newer, below 2.0 is needed"),
        (package(), 0.5, "cuDNN 91900 is wrong by 0.5 on small inputs"),
        (package(), float("nan"), "cuDNN 91900 is wrong by nan on small inputs"),
        (package(), RuntimeError("no plan"), "cuDNN 91900 failed on small inputs: no plan"),
    ],
)
def test_why_it_stays_in_16_bits_is_one_line_once(gpu, caplog, module, self_test, words):
    (line,) = said(gpu, caplog, module, self_test)
    assert line.startswith(f"self-attention stays in 16 bits: {words}") and "\n" not in line


def test_an_older_card_is_named(gpu, caplog):
    gpu.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    (line,) = said(gpu, caplog, package())
    assert line.endswith("in fp8 it needs compute capability 9.0 or newer, this GPU has 8.9")


def test_what_is_right_on_small_inputs_is_used(gpu, caplog):
    assert said(gpu, caplog, package()) == []


def test_the_cpu_has_the_reference():
    assert eight.cudnn_attends(torch.device("cpu"), (1, 40, 2, 128))


def test_cudnns_graph_is_what_its_package_takes():
    """Builds the graph with the real package, where it is installed: no GPU is needed for that much."""
    module = pytest.importorskip("cudnn")
    graph, found = eight.build(module, (2, 32760, 12, 128), sm_version=90)
    assert found["out"].get_dim() == [2, 12, 32760, 128] and graph is not None
