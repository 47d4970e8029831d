"""Self-attention over video tokens: the best that is there, or in 8 bits.

Letters: B batch, S video tokens, A heads, E head width, P S padded to whole blocks, b blocks of P tokens.

`lossless` (the default) computes in the inputs' dtype: FlashAttention-3 where it is importable and the GPU is
a Hopper, else PyTorch's own in the order cuDNN, flash, memory-efficient, plain. `high` is this project's own
kernel for GPUs with 8-bit tensor cores, after SageAttention2 (Zhang et al., arXiv 2411.10958): queries and
keys in int8 with a scale for each block of tokens, the keys' mean over all tokens taken out before (the
softmax does not see it, the scale is spent on what differs), probabilities and values in fp8. It is lossy, so
it is opt-in.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .common import (
    INTERPRETED,
    TorchOp,
    launch,
    power_of_two,
    require,
    require_alike,
    served,
    tl,
    to_fp8,
    triton,
)
from .cross_attention import attention

TIERS = ("lossless", "high")
BLOCK = 128
"""Tokens that share a scale, of queries and of keys; also the kernel's tiles."""
MAX_WIDTH = 128
"""The widest head that the 8-bit kernel takes."""

# Reference: what the 8-bit kernel computes, but for the rounding of its probabilities.


def _blocks(x: Tensor) -> Tensor:
    """[B,S,A,E] -> [B,A,b,BLOCK,E], zero behind the end."""
    x = x.transpose(1, 2)  # [B,A,S,E]
    return F.pad(x, (0, 0, 0, -x.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK))


def int8_reference(x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [B,S,A,E], mean float32 [B,A,E] -> int8 [B,A,P,E] and float32 scales [B,A,b]: x - mean is int8 *
    scale.
    """
    wide = x.float() if mean is None else x.float() - mean[:, None]
    blocks = _blocks(wide)  # [B,A,b,BLOCK,E]
    scale = blocks.abs().amax(dim=(-1, -2)).clamp(min=1e-8) / 127.0  # [B,A,b]
    rounded = (blocks / scale[..., None, None] + 0.5).floor().to(torch.int8)
    return rounded.flatten(2, 3), scale


def fp8_reference(v: Tensor, scale: Tensor) -> Tensor:
    """v [B,S,A,E], scale float32 [B,A,E] -> v / scale as float8_e4m3fn, transposed: [B,A,E,P]."""
    blocks = _blocks(v.float() / scale[:, None]).flatten(2, 3)  # [B,A,P,E]
    return blocks.transpose(-1, -2).contiguous().to(torch.float8_e4m3fn)


def key_mean(k: Tensor) -> Tensor:
    """The keys' mean over all tokens: [B,S,A,E] -> float32 [B,A,E]."""
    return k.mean(dim=1, dtype=torch.float32)


def value_scale(v: Tensor) -> Tensor:
    """Each channel's scale, which takes its largest value to 448: [B,S,A,E] -> float32 [B,A,E]."""
    return v.abs().amax(dim=1).float().clamp(min=1e-8) / 448.0


def attention8_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the quantised q, k and v, [B,S,A,E] each, by exact softmax. Returns [B,S,A,E] in q's
    dtype.
    """
    tokens = q.shape[1]
    scale = value_scale(v)
    found = []
    for x, mean in ((q, None), (k, key_mean(k))):
        rounded, step = int8_reference(x, mean)
        exact = rounded.unflatten(2, (-1, BLOCK)).float() * step[..., None, None]
        found.append(exact.flatten(2, 3)[:, :, :tokens])  # [B,A,S,E]
    queries, keys = found
    values = fp8_reference(v, scale).float().transpose(-1, -2)[:, :, :tokens] * scale[:, :, None]
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).type_as(q)  # [B,S,A,E]


# Triton.


@triton.jit
def int8_kernel(
    x, mean, out, scale,
    S, A, x_b, x_s, x_a,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, HAS_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one block of tokens of one head, to int8 [B*A,P,BLOCK_E] and a scale."""
    block, row = tl.program_id(0), tl.program_id(1)
    first = block.to(tl.int64) * BLOCK
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    inside = (rows < S - first)[:, None] & (columns < WIDTH)[None, :]
    place = x + (row // A).to(tl.int64) * x_b + (row % A) * x_a + first * x_s
    value = tl.load(place + rows[:, None] * x_s + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        value -= tl.load(mean + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)[None, :]
        value = tl.where(inside, value, 0.0)
    step = tl.maximum(tl.max(tl.max(tl.abs(value), 1), 0), 1e-8) / 127.0
    rounded = tl.floor(value / step + 0.5).to(tl.int8)
    blocks = tl.num_programs(0)
    target = out + (row.to(tl.int64) * blocks * BLOCK + first) * BLOCK_E
    tl.store(target + rows[:, None] * BLOCK_E + columns[None, :], rounded)
    tl.store(scale + row * blocks + block, step)


@triton.jit
def fp8_kernel(
    v, scale, out,
    S, A, v_b, v_s, v_a,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One program: one block of tokens of one head, to fp8 [B*A,BLOCK_E,P], as tensor cores want it."""
    block, row = tl.program_id(0), tl.program_id(1)
    first = block.to(tl.int64) * BLOCK
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    inside = (rows < S - first)[:, None] & (columns < WIDTH)[None, :]
    place = v + (row // A).to(tl.int64) * v_b + (row % A) * v_a + first * v_s
    value = tl.load(place + rows[:, None] * v_s + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    value /= tl.load(scale + row * WIDTH + columns, mask=columns < WIDTH, other=1.0)[None, :]
    padded = tl.num_programs(0).to(tl.int64) * BLOCK
    target = out + row * padded * BLOCK_E + first + columns[:, None] * padded + rows[None, :]
    tl.store(target, to_fp8(tl.trans(value), ROUND))


@triton.jit
def _step8(
    q, k, v, row_scale, k_scale, block, S, padded, acc, top, total,
    BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One block of keys. Probabilities are 256 times too large, for fp8's range; that cancels at the end."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    keys = tl.load(k + (block * BLOCK + rows)[:, None] * BLOCK_E + columns[None, :])
    logits = tl.dot(q, tl.trans(keys)).to(tl.float32) * (row_scale * tl.load(k_scale + block))
    if LAST:
        logits = tl.where((block * BLOCK + rows < S)[None, :], logits, -float("inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - (higher - 8.0)[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    values = tl.load(v + columns[:, None] * padded + (block * BLOCK + rows)[None, :])
    # Hopper sums fp8 products in fewer bits than float32: no further than one block, then they are added in
    # full.
    acc = acc * shrink[:, None] + tl.dot(to_fp8(weights, ROUND), tl.trans(values))
    return acc, higher, total


@triton.jit
def attention8_kernel(
    q, k, v, q_scale, k_scale, v_scale, out,
    S, A, logit_scale, out_b, out_s, out_a,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK queries of one head. q, k int8 [B*A,P,BLOCK_E], v fp8 [B*A,BLOCK_E,P]."""
    block, row = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    padded = blocks * BLOCK
    first = block.to(tl.int64) * BLOCK
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    head = row.to(tl.int64) * padded * BLOCK_E
    queries = tl.load(q + head + first * BLOCK_E + rows[:, None] * BLOCK_E + columns[None, :])
    row_scale = tl.load(q_scale + row * blocks + block) * logit_scale
    k += head
    v += head
    k_scale += row * blocks
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for number in range(0, blocks - 1):
        acc, top, total = _step8(
            queries, k, v, row_scale, k_scale, number, S, padded, acc, top, total,
            BLOCK_E, BLOCK, False, ROUND,
        )  # fmt: skip
    acc, top, total = _step8(
        queries, k, v, row_scale, k_scale, blocks - 1, S, padded, acc, top, total,
        BLOCK_E, BLOCK, True, ROUND,
    )  # fmt: skip
    channel = tl.load(v_scale + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    acc = acc / total[:, None] * channel[None, :]
    inside = (rows < S - first)[:, None] & (columns < WIDTH)[None, :]
    place = out + (row // A).to(tl.int64) * out_b + (row % A) * out_a + first * out_s
    tl.store(place + rows[:, None] * out_s + columns[None, :], acc.to(out.dtype.element_ty), mask=inside)


def attention8_triton(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Launches the kernels into `out` [B,S,A,E], contiguous, and returns it: three that quantise, one that
    attends.

    128 queries against 128 keys at 8 warps: accumulator and logits take 64 registers a thread each.
    """
    batch, tokens, heads, width = q.shape
    block_e = power_of_two(width, 32, MAX_WIDTH)
    blocks, rows = -(-tokens // BLOCK), batch * heads
    q8, k8 = (q.new_empty((rows, blocks * BLOCK, block_e), dtype=torch.int8) for _ in range(2))
    v8 = q.new_empty((rows, block_e, blocks * BLOCK), dtype=torch.float8_e4m3fn)
    q_step, k_step = (q.new_empty((rows, blocks), dtype=torch.float32) for _ in range(2))
    mean, scale = key_mean(k), value_scale(v)
    sizes = {"WIDTH": width, "BLOCK_E": block_e, "BLOCK": BLOCK}
    small = {"num_warps": 8, "num_stages": 1}
    for x, centre, x8, step in ((q, None, q8, q_step), (k, mean, k8, k_step)):
        launch(
            int8_kernel, (blocks, rows), x, x if centre is None else centre, x8, step,
            tokens, heads, *x.stride()[:3], HAS_MEAN=centre is not None, **sizes, **small,
        )  # fmt: skip
    launch(
        fp8_kernel, (blocks, rows), v, scale, v8,
        tokens, heads, *v.stride()[:3], **sizes, ROUND=INTERPRETED, **small,
    )  # fmt: skip
    launch(
        attention8_kernel, (blocks, rows), q8, k8, v8, q_step, k_step, scale, out,
        tokens, heads, math.log2(math.e) / math.sqrt(width), *out.stride()[:3],
        **sizes, ROUND=INTERPRETED, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


# The torch op.


def _check(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError with one line that says what is wrong."""
    require_alike(op, q=q, k=k, v=v)
    require(op, q.dim() == 4 and q.numel() > 0, f"q must be [B,S,A,E], not {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        require(op, tensor.shape == q.shape, f"{name} must be {list(q.shape)} as q, not {list(tensor.shape)}")


def _check8(q: Tensor, k: Tensor, v: Tensor) -> None:
    op = "attention8"
    _check(op, q, k, v)
    require(op, q.dtype != torch.float64, "float64 is not for 8 bits: take the tier 'lossless'")
    require(op, q.shape[-1] <= MAX_WIDTH, f"heads are at most {MAX_WIDTH} wide, not {q.shape[-1]}")
    if q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        message = f"the tier 'high' needs fp8 (compute capability 8.9 or newer), this GPU has {major}.{minor}"
        require(op, (major, minor) >= (8, 9), f"{message}: take the tier 'lossless'")


_attention8 = TorchOp(
    "attention8(Tensor q, Tensor k, Tensor v) -> Tensor",
    check=_check8,
    reference=attention8_reference,
    cuda=lambda q, k, v: attention8_triton(q.new_empty(q.shape), q, k, v),
    empty=lambda q, k, v: q.new_empty(q.shape),
)


# The best lossless attention that is there.


FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""PyTorch's own in the order in which they are tried."""


@functools.cache
def flash_attention_3() -> Callable[..., object] | None:
    """FlashAttention-3's function where its package can be imported, else None; looked for once."""
    try:
        return importlib.import_module("flash_attn_interface").flash_attn_func
    except ImportError:
        return None


@torch.compiler.assume_constant_result
def _with_flash_attention_3(index: int) -> bool:
    """Whether there is one for the GPU of this number. A constant to torch.compile, which cannot import."""
    return torch.cuda.get_device_capability(index)[0] == 9 and flash_attention_3() is not None


def _lossless(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention on CUDA in the inputs' dtype, [B,S,A,E]."""
    if q.dtype in (torch.float16, torch.bfloat16) and _with_flash_attention_3(q.device.index):
        out = flash_attention_3()(q, k, v)  # type: ignore[misc]  # it is there
        return out[0] if isinstance(out, tuple) else out  # type: ignore[return-value]  # some also give the sums
    with sdpa_kernel(FASTEST, set_priority=True):
        return attention(q, k, v)


def self_attention(q: Tensor, k: Tensor, v: Tensor, tier: str = "lossless") -> Tensor:
    """Softmax attention among video tokens, scaled by 1/sqrt(E): q, k, v [B,S,A,E] -> [B,S,A,E] in q's dtype.

    tier: "lossless", or "high" for 8 bits (its error: `RELATIVE_L2` in tolerances.py), which has no
    gradients. Raises ValueError for another tier, other shapes, mixed dtypes or devices, and for "high" on a
    GPU without fp8.
    """
    require("self_attention", tier in TIERS, f"unknown tier {tier!r}: choose one of {', '.join(TIERS)}")
    if tier == "high":
        return _attention8(q, k, v)
    _check("self_attention", q, k, v)
    return _lossless(q, k, v) if served(q, k, v) else attention(q, k, v)
