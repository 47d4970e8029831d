"""Self-attention: by whom, in which layout, at which length.

Letters: S video tokens, A heads, E head width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from conceptmaster.kernels import fp8_attention as fp8
from conceptmaster.kernels import self_attention as attending
from conceptmaster.kernels.cross_attention import attention
from conceptmaster.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from conceptmaster.kernels.tolerances import RELATIVE_L2

from ..case import EPS
from ..job import Job
from ..model import relative_l2
from ..timing import Call
from .question import Missing, Question

ALLOWED = 1e-2
"""What bfloat16 may be off; it is some 2e-3."""
ROWS = 64


def questions(job: Job) -> Iterator[Question]:
    """Of 1.3B at 480p: 32,760 tokens, and 32,768, which tiles of 128 divide."""
    for tokens in (24, 32) if job.small else (32760, 32768):
        yield _question(job, tokens, *((2, 16) if job.small else (12, 128)))
    yield _in_fp8(job, *((24, 2, 16) if job.small else (32760, 12, 128)))


def _question(job: Job, tokens: int, heads: int, width: int) -> Question:
    g = torch.Generator(device=job.device).manual_seed(3)
    new = functools.partial(torch.randn, generator=g, device=job.device, dtype=torch.bfloat16)
    q, k, v = (new(1, tokens, heads, width) for _ in range(3))  # [1,S,A,E]
    rows = torch.arange(0, tokens, max(1, tokens // ROWS), device=job.device)

    def error(out: Tensor) -> float:
        return relative_l2(out[:, rows], attention(q[:, rows].double(), k.double(), v.double()))

    def pytorch(backend: SDPBackend, heads_first: bool) -> Callable[[], Call]:
        def build() -> Call:
            turned = [x.transpose(1, 2) for x in (q, k, v)]  # [1,A,S,E]
            a, b, c = [x.contiguous() for x in turned] if heads_first else turned
            return lambda: F.scaled_dot_product_attention(a, b, c).transpose(1, 2)

        return lambda: _by(backend, job.device, build())

    def flash_attention_3() -> Call:
        function = attending.flash_attention_3(q)
        if function is None:
            raise Missing("it is for Hopper: install flash_attn_interface, or run kernels/flash3/build.sh")
        return functools.partial(function, q, k, v)

    return Question(
        f"self-attention, {tokens} tokens",
        {"B": 1, "S": tokens, "A": heads, "E": width},
        {
            "cuDNN, tokens before heads": pytorch(SDPBackend.CUDNN_ATTENTION, False),
            "cuDNN, heads before tokens": pytorch(SDPBackend.CUDNN_ATTENTION, True),
            "the same, with the copies": lambda: lambda: attending.heads_first_attention(q, k, v),
            "PyTorch's flash attention": pytorch(SDPBackend.FLASH_ATTENTION, False),
            "FlashAttention-3": flash_attention_3,
            "as the engine takes it": lambda: lambda: attending.self_attention(q, k, v),
        },
        error,
        ALLOWED,
        flops=4.0 * tokens * tokens * heads * width,
    )


def _in_fp8(job: Job, tokens: int, heads: int, width: int) -> Question:
    """From what the products give: norm, rotation and attention, in bfloat16 and in fp8."""
    g = torch.Generator(device=job.device).manual_seed(3)
    new = functools.partial(torch.randn, generator=g, device=job.device)
    q, k, v = (new(1, tokens, heads * width, dtype=torch.bfloat16) for _ in range(3))  # [1,S,D]
    a, b = (1 + 0.1 * new(heads * width, dtype=torch.bfloat16) for _ in range(2))  # weights of the norms
    angles = 6 * new(tokens, 1, width // 2)
    cos, sin = angles.cos(), angles.sin()
    rows = torch.arange(0, tokens, max(1, tokens // ROWS), device=job.device)

    def error(out: Tensor | fp8.Quantised) -> float:
        found = out if isinstance(out, Tensor) else out.values.float() * out.scale
        exact_q, exact_k = qk_norm_rope_reference(
            q.double(), k.double(), a.double(), b.double(), cos.double(), sin.double(), EPS
        )  # [1,S,A,E] each
        values = v.double().unflatten(-1, (heads, -1))
        return relative_l2(found[:, rows], attention(exact_q[:, rows], exact_k, values))

    def in_bfloat16() -> Tensor:
        turned_q, turned_k = qk_norm_rope(q, k, a, b, cos, sin, eps=EPS)
        return attending.self_attention(turned_q, turned_k, v.unflatten(-1, (heads, -1)))

    steps = fp8.query_key_steps(a, b)

    def by_cudnn(before: bool) -> Call:
        if not fp8.cudnn_attends(q.device, (1, tokens, heads, width)):
            raise Missing("cuDNN does not attend in fp8 here: the log says why")
        ready = fp8.qkv_to_fp8(q, k, v, a, b, cos, sin, steps, EPS)
        if before:
            return lambda: fp8.fp8_attention(*ready)
        return lambda: fp8.fp8_attention(*fp8.qkv_to_fp8(q, k, v, a, b, cos, sin, steps, EPS))

    lossy = RELATIVE_L2["attention8"]
    return Question(
        "self-attention in fp8",
        {"B": 1, "S": tokens, "A": heads, "E": width},
        {
            "norm, rotation and attention in bfloat16": lambda: in_bfloat16,
            "fp8, from bfloat16": lambda: by_cudnn(False),
            "fp8, quantised before": lambda: by_cudnn(True),
        },
        error,
        {
            "norm, rotation and attention in bfloat16": ALLOWED,
            "fp8, from bfloat16": lossy,
            "fp8, quantised before": lossy,
        },
        flops=4.0 * tokens * tokens * heads * width,
    )


def _by(backend: SDPBackend, device: str, call: Call) -> Call:
    """The call with this backend alone; on a CPU, which lacks most, with PyTorch's choice."""

    def run() -> Tensor:
        with sdpa_kernel(backend) if device == "cuda" else contextlib.nullcontext():
            return call()

    return run
