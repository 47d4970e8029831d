"""Which kernel the ops of cross_attention.py launch on CUDA: Hopper's where it is right, else the plain one.

The kernel of cross_attention_hopper.py is compiled in variants. The first time one is wanted on a GPU, it
runs on a few queries, beside the plain kernel. Where Triton or the driver refuses it, or where the two differ
by more than their dtype allows, the log says so once, and that GPU has the plain kernel from then on. Inside
the capture of a CUDA graph nothing can be compared: what has not been proven before gets the plain kernel.
"""

from __future__ import annotations

import logging
import os
import time
from types import ModuleType

import torch
from torch import Tensor

from .cross_attention_plain import FEW_QUERIES, cross_attention_triton
from .tolerances import TOLERANCES

log = logging.getLogger(__name__)

PLAIN = "CONCEPTMASTER_PLAIN_ATTENTION"
"""With this in the environment, set to 1, the plain kernel runs everywhere."""

SECONDS = 20.0
"""After which a self-test that has not ended never will."""

Keys = tuple[Tensor, Tensor] | None

_proven: set[tuple[object, ...]] = set()  # variants that were right, each with its GPU and dtype
_refused: set[int | None] = set()  # GPUs that have the plain kernel


def cross_attention_cuda(
    q: Tensor,
    text: Keys,
    concepts: Keys,
    mask: Tensor | None = None,
    inverse_rms: Tensor | None = None,
    text_bias: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Tensor:
    """`cross_attention_triton` into a new tensor [B,S,A,E], by the faster kernel."""
    given = (q, text, concepts, mask, inverse_rms, text_bias)
    out = q.new_empty(q.shape)
    if boxes is not None:  # which Hopper's kernel does not know
        return cross_attention_triton(out, *given, boxes)
    hopper = _hopper(q)
    if hopper is None:
        return cross_attention_triton(out, *given)
    if text is not None and concepts is not None and concepts[0].shape[1] > hopper.MOST_BESIDE:
        found = cross_attention_cuda(q, text, None, None, inverse_rms, text_bias)
        return found.add_(cross_attention_cuda(q, None, concepts, mask, inverse_rms))
    if hopper.takes(q, text, concepts) and _proves(hopper, *given):
        programs = torch.cuda.get_device_properties(q.device).multi_processor_count
        return hopper.hopper_attention_triton(out, *given, programs=programs)
    return cross_attention_triton(out, *given)


def _hopper(q: Tensor) -> ModuleType | None:
    """Hopper's kernel where it may win: on such a GPU, with many queries."""
    if q.numel() // q.shape[-1] <= FEW_QUERIES or q.device.index in _refused or os.environ.get(PLAIN) == "1":
        return None
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return None
    try:
        from . import cross_attention_hopper
    except ImportError as error:  # another Triton, whose Gluon has other names
        _refuse(q.device, error)
        return None
    return cross_attention_hopper


def _proves(hopper: ModuleType, q: Tensor, *others: object) -> bool:
    """Whether the variant for these arguments is right on this GPU: known, or found out now."""
    variant = (q.device.index, q.dtype, *hopper.variant(q, *others).values())
    if variant in _proven:
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    try:
        _compare(hopper, q, *others)  # type: ignore[arg-type]
    except TimeoutError:  # nothing else will run, either
        raise
    except Exception as error:  # whatever a compiler, a launcher or a comparison finds wrong
        _refuse(q.device, error)
        return False
    _proven.add(variant)
    return True


def _refuse(device: torch.device, error: Exception) -> None:
    _refused.add(device.index)
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    log.warning("%s has the plain cross-attention kernel; Hopper's own failed: %s", device, reason)


def _compare(
    hopper: ModuleType,
    q: Tensor,
    text: Keys,
    concepts: Keys,
    mask: Tensor | None,
    inverse_rms: Tensor | None,
    text_bias: Tensor | None,
) -> None:
    """Raises ArithmeticError where the kernels differ for 200 queries of 2 batch rows and 2 heads.

    Raises TimeoutError for a kernel that does not end: such a process can do nothing more on that GPU.
    """
    generator = torch.Generator().manual_seed(0)

    def new(tokens: int) -> Tensor:
        return torch.randn(2, tokens, 2, q.shape[3], generator=generator).to(q)

    def keys(like: Keys) -> Keys:
        return None if like is None else (new(like[0].shape[1]), new(like[1].shape[1]))

    small = new(200)  # [B,S,A,E]
    sets = keys(text), keys(concepts)
    if mask is not None:  # no concepts in the first row
        mask = torch.rand(2, mask.shape[1], generator=generator).to(q.device) < 0.6  # [B,C]
        mask[0] = False
    if text_bias is not None:
        text_bias = torch.randn(2, text_bias.shape[1], generator=generator).to(q.device)  # [B,T]
        text_bias[:, text_bias.shape[1] * 2 // 3 + 1 :] = -torch.inf
    if inverse_rms is not None:
        inverse_rms = 0.5 + torch.rand(2, 200, generator=generator).to(q.device)  # [B,S]
    outs = torch.full_like(small, torch.nan), torch.empty_like(small)
    cross_attention_triton(outs[1], small, *sets, mask, inverse_rms, text_bias)
    hopper.hopper_attention_triton(outs[0], small, *sets, mask, inverse_rms, text_bias, programs=3)
    _await(q.device)
    relative, absolute = TOLERANCES[str(q.dtype).removeprefix("torch.")]
    if not torch.allclose(*outs, rtol=relative, atol=absolute):
        worst = (outs[0].float() - outs[1].float()).abs().max()
        raise ArithmeticError(f"its results differ from the plain kernel's by up to {worst:.2g}")


def _await(device: torch.device) -> None:
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    latest = time.monotonic() + SECONDS
    while not done.query():
        if time.monotonic() > latest:
            raise TimeoutError(f"it did not end within {SECONDS:.0f} s: start again with {PLAIN}=1")
        time.sleep(0.001)
