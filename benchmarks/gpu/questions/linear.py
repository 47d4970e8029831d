"""Products: what their epilogue can take over, how many there must be, and how fp8 sums up.

Letters: K guidance branches, S video tokens, D width, O output width, C rows of folded values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptmaster.kernels.fp8_linear import quantise_rows
from conceptmaster.kernels.tolerances import RELATIVE_L2

from ..card import no_fp8
from ..job import Job
from ..model import relative_l2
from ..timing import Call
from .question import Missing, Question

ALLOWED = 1e-2
"""What bfloat16 may be off; it is some 3e-3."""
ROWS = 64


def questions(job: Job) -> Iterator[Question]:
    """At 1.3B and 480p, one branch."""
    tokens, width, hidden = (24, 32, 64) if job.small else (32760, 1536, 8960)
    for make in (_gelu, _one_product, _fp8):
        yield make(job, tokens, width, hidden)
    yield _sum(job, tokens, width, 16 if job.small else 768)


def _gelu(job: Job, tokens: int, width: int, hidden: int) -> Question:
    x, weight, bias = _operands(job, tokens, width, hidden)
    gelu = functools.partial(F.gelu, approximate="tanh")

    def error(out: Tensor) -> float:
        return relative_l2(out[:ROWS], gelu(F.linear(x[:ROWS].double(), weight.double(), bias.double())))

    return Question(
        "GELU behind a product",
        {"M": tokens, "I": width, "O": hidden},
        {
            "a kernel of its own": lambda: lambda: gelu(F.linear(x, weight, bias)),
            "in the product's epilogue": lambda: (
                lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
            ),
        },
        error,
        ALLOWED,
        flops=2.0 * tokens * width * hidden,
    )


def _one_product(job: Job, tokens: int, width: int, hidden: int) -> Question:
    x, weight, bias = _operands(job, tokens, width, 3 * width)
    parts = list(zip(weight.chunk(3), bias.chunk(3), strict=True))

    def error(out: tuple[Tensor, ...]) -> float:
        found = torch.cat([part[:ROWS] for part in out], dim=-1)
        return relative_l2(found, F.linear(x[:ROWS].double(), weight.double(), bias.double()))

    return Question(
        "q, k and v",
        {"M": tokens, "I": width, "O": 3 * width},
        {
            "three products": lambda: lambda: tuple(F.linear(x, w, b) for w, b in parts),
            "one product": lambda: lambda: F.linear(x, weight, bias).chunk(3, dim=-1),
        },
        error,
        ALLOWED,
        flops=6.0 * tokens * width**2,
    )


def _fp8(job: Job, tokens: int, width: int, hidden: int) -> Question:
    x, weight, bias = _operands(job, tokens, width, hidden)

    def error(out: Tensor) -> float:
        return relative_l2(out[:ROWS], F.linear(x[:ROWS].double(), weight.double(), bias.double()))

    def quantised(fast: bool) -> Call:
        reason = no_fp8() if job.device == "cuda" else "a CPU's product has one scale for all rows, if any"
        if reason is not None:
            raise Missing(reason)
        (x8, scale), (weight8, weight_scale) = quantise_rows(x), quantise_rows(weight)
        options: dict[str, Any] = {"scale_a": scale, "scale_b": weight_scale.t(), "bias": bias}
        options |= {"out_dtype": torch.bfloat16, "use_fast_accum": fast}
        return lambda: torch._scaled_mm(x8, weight8.t(), **options)

    lossy = RELATIVE_L2["linear8"]
    return Question(
        "fp8 product, operands quantised before",
        {"M": tokens, "I": width, "O": hidden},
        {
            "bfloat16": lambda: lambda: F.linear(x, weight, bias),
            "fp8": lambda: quantised(False),
            "fp8, fast accumulation": lambda: quantised(True),
        },
        error,
        {"bfloat16": ALLOWED, "fp8": lossy, "fp8, fast accumulation": lossy},
        flops=2.0 * tokens * width * hidden,
    )


def _sum(job: Job, tokens: int, width: int, rows: int) -> Question:
    """x + p · v, as the folded injection does it for both branches."""
    g = torch.Generator(device=job.device).manual_seed(5)
    new = functools.partial(torch.randn, generator=g, device=job.device, dtype=torch.bfloat16)
    x, p, v = new(2, tokens, width), new(2, tokens, rows) / rows, new(2, rows, width)
    here = x.clone()

    def error(out: Tensor) -> float:
        exact = x[:, :ROWS].double() + p[:, :ROWS].double() @ v.double()
        return relative_l2(out[:, :ROWS], exact)

    return Question(
        "a sum with a product",
        {"K": 2, "S": tokens, "C": rows, "D": width},
        {
            "out of place": lambda: lambda: torch.baddbmm(x, p, v),
            "in place": lambda: lambda: here.baddbmm_(p, v),  # right the first time, which is when it is held
        },
        error,
        ALLOWED,
        flops=4.0 * tokens * rows * width,
    )


def _operands(job: Job, tokens: int, width: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [M,I], weight [O,I] and bias [O] in bfloat16."""
    g = torch.Generator(device=job.device).manual_seed(4)
    new = functools.partial(torch.randn, generator=g, device=job.device, dtype=torch.bfloat16)
    return new(tokens, width), new(out, width) * width**-0.5, new(out)
