"""Self-attention over video tokens: the fastest exact one that is there, found by measuring.

Letters: B batch, S video tokens, A heads, E head width.

On CUDA there are several ways: PyTorch's own in the order cuDNN, flash, memory-efficient, plain, on tensors
as they are or with the heads first; and FlashAttention-3 where there is one. The first call of a shape on a
device times those that agree with the first, says in one line of the log which it takes, and keeps to that.
Elsewhere, and where a gradient is wanted, it is plain PyTorch.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .common import check_operands, operands, served
from .cross_attention import attention
from .flash_attention_3 import flash_attention_3
from .tolerances import TOLERANCES

log = logging.getLogger(__name__)

FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""PyTorch's own in the order in which they are tried."""

PYTORCH, HEADS_FIRST, FLASH_3 = WAYS = ("pytorch", "pytorch-heads-first", "flash-attention-3")
"""The ways to compute it, the first as default."""
FEW_TOKENS = 2048
"""With fewer there is nothing to be gained by measuring."""
GAIN = 0.98
"""Another way than the default must take at most so much of its time: a near tie would be tossed anew by
every process."""
ROUNDS = 5

OPERANDS = operands("q BSAE, k BSAE, v BSAE")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_chosen: dict[tuple[object, ...], str] = {}  # (device, dtype, shape) -> way


def pytorch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fastest on [B,S,A,E], which cuDNN takes as they lie."""
    with sdpa_kernel(FASTEST, set_priority=True):
        return attention(q, k, v)


def heads_first_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same on [B,A,S,E] in memory; [B,S,A,E] in and out, copies included."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return pytorch_attention(q, k, v).contiguous()


def ways(q: Tensor) -> dict[str, Attend]:
    """Those that there are for q [B,S,A,E] on CUDA, by name, the default first."""
    found: dict[str, Attend] = {PYTORCH: pytorch_attention}
    if q.dtype in (torch.float16, torch.bfloat16):
        found[HEADS_FIRST] = heads_first_attention
        if (flash := flash_attention_3(q)) is not None:
            found[FLASH_3] = flash
    return found


def choose(
    rivals: Mapping[str, Attend],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    time: Callable[[Callable[[], object]], float],
) -> tuple[str, dict[str, float | str]]:
    """The fastest of `rivals` for these tensors, the first where none gains; and what was found of each:
    milliseconds, the median of rounds in which they took turns, or why it is out.

    time: milliseconds of a call. A rival that is further from the first than its dtype allows is out, and one
    that raises RuntimeError, as without memory.
    """
    default, *others = rivals
    right = rivals[default](q, k, v)
    tolerance = TOLERANCES[str(q.dtype).removeprefix("torch.")][0]
    found: dict[str, float | str] = {}
    for name in others:
        try:
            error = _relative_l2(rivals[name](q, k, v), right)
        except RuntimeError as reason:
            found[name] = " ".join(str(reason).split())[:100]
            continue
        if not error <= tolerance:
            found[name] = f"wrong by {error:.2g}"
    left = [name for name in rivals if name not in found]
    rounds = [{name: time(lambda f=rivals[name]: f(q, k, v)) for name in left} for _ in range(ROUNDS)]  # type: ignore[misc]
    medians = {name: statistics.median(times[name] for times in rounds) for name in left}
    fastest = min(left, key=lambda name: medians[name])
    taken = fastest if medians[fastest] <= GAIN * medians[default] else default
    return taken, {**medians, **found}


def _relative_l2(found: Tensor, right: Tensor) -> float:
    return float(torch.linalg.vector_norm((found - right).float()) / torch.linalg.vector_norm(right.float()))


def _milliseconds(call: Callable[[], object]) -> float:
    """Of a call on the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _way(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The way for these tensors, measured once; the default while a graph is being captured or compiled."""
    if torch.compiler.is_compiling() or q.shape[1] < FEW_TOKENS:
        return PYTORCH
    key = (q.device, q.dtype, q.shape)
    if key not in _chosen:
        rivals = ways(q)
        if len(rivals) == 1 or torch.cuda.is_current_stream_capturing():
            return PYTORCH
        with torch.cuda.device(q.device), torch.no_grad():
            _chosen[key], found = choose(rivals, q, k, v, _milliseconds)
        parts = [f"{n} {x:.3f} ms" if isinstance(x, float) else f"{n}: {x}" for n, x in found.items()]
        log.info("self-attention %s: takes %s (%s)", list(q.shape), _chosen[key], ", ".join(parts))
    return _chosen[key]


def self_attention(q: Tensor, k: Tensor, v: Tensor, way: str | None = None) -> Tensor:
    """Softmax attention among video tokens, scaled by 1/sqrt(E): q, k, v [B,S,A,E] -> [B,S,A,E] in q's dtype.

    way: on CUDA, one of WAYS, for the same bits on every run of a card; None takes the fastest, see above.
    Raises ValueError for other shapes, mixed dtypes or devices, and for a way that is not there.
    """
    check_operands("self_attention", OPERANDS, (q, k, v))
    if not served(q, k, v):
        return attention(q, k, v)
    taken = way or _way(q, k, v)
    if taken == PYTORCH:
        return pytorch_attention(q, k, v)
    found = ways(q)
    if taken not in found:
        raise ValueError(f"self_attention: there is no {taken!r} here: choose one of {', '.join(found)}")
    return found[taken](q, k, v)
