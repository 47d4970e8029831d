"""FlashAttention-3 (Shah et al., arXiv 2407.08608) for Hopper: its own package, or what flash3/build.sh
built.

Letters: B batch, S video tokens, A heads, E head width.

No binary of it is part of this project. Its package is `flash_attn_interface`; where that is not installed,
the forward pass alone may lie as a library beside the script that compiles it: bfloat16, heads of 128.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent / "flash3" / "libflash3.so"
"""What flash3/build.sh leaves."""
HEAD_WIDTH = 128
"""Of a head, for the library."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@functools.cache
def _package() -> Callable[..., object] | None:
    """The function of FlashAttention-3's package where it can be imported, else None."""
    try:
        return importlib.import_module("flash_attn_interface").flash_attn_func
    except ImportError:
        return None


@functools.cache
def _library() -> Callable[..., None] | None:
    """The library's function, None where it is not built or does not load."""
    try:
        function = ctypes.CDLL(str(LIBRARY)).flash3_forward
    except (OSError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [*[pointer] * 5, *[number] * 3, pointer, ctypes.c_float, number, pointer]
    function.restype = None
    return function


def flash_attention_3(q: Tensor) -> Attend | None:
    """FlashAttention-3 for queries, keys and values like q [B,S,A,E]; None where there is none for these."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return None
    if q.dtype in (torch.float16, torch.bfloat16) and _package() is not None:
        return _by_package
    if q.dtype == torch.bfloat16 and q.shape[-1] == HEAD_WIDTH and _library() is not None:
        return _by_library
    return None


def _by_package(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    function = _package()
    assert function is not None
    out = function(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # type: ignore[return-value]  # some also give the sums


def _by_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    function = _library()
    assert function is not None
    batch, tokens, heads, width = q.shape
    out = q.new_empty(q.shape)
    sums = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    strides = (ctypes.c_int64 * 12)(*(step for x in (q, k, v, out) for step in x.stride()[:3]))
    with torch.cuda.device(q.device):
        function(
            *(x.data_ptr() for x in (q, k, v, out, sums)), batch, tokens, heads, strides, width**-0.5,
            torch.cuda.get_device_properties(q.device).multi_processor_count,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out
