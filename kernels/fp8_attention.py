"""Self-attention in fp8: queries, keys and values quantised as they are made, the rest by cuDNN on Hopper.

Letters: B batch, S video tokens, D width, A heads, E head width.

cuDNN's attention in float8_e4m3fn (Hopper and newer, through the package nvidia-cudnn-frontend) takes one
scale for each of its tensors and gives fp8 again. So:

* the norm bounds queries and keys: no value exceeds sqrt(D) times the largest weight, so their scales are
  known before they are computed, and `qkv_to_fp8` writes them straight in fp8, normalised and rotated;
* the mean over all tokens is taken off every key first (after SageAttention, Zhang et al., arXiv 2410.02367):
  it adds the same to all logits of a query, which the softmax does not see, and what is left is smaller;
* the output is a mean of values, so it is quantised with their scale.

Part of the opt-in tier `high`: its error is `RELATIVE_L2["attention8"]` in tolerances.py.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from typing import Any

import torch
from torch import Tensor

from ..errors import how_to_install
from .common import INTERPRETED, TorchOp, launch, power_of_two, require, tl, to_fp8, triton, wide
from .cross_attention import attention
from .fp8_linear import FP8_MAX, Quantised, to_float8
from .qk_norm_rope import MAX_WIDTH, normed_rotated, qk_norm_rope_reference
from .tolerances import RELATIVE_L2

log = logging.getLogger(__name__)

V_MAX = 416.0
"""Of quantised values: an output exceeds the largest by 1/16 at most, the rounding of
probabilities, and stays below FP8_MAX."""
PROBABILITY_STEP = 1.0 / 256.0
"""Probabilities, before they are divided by their sum, are 1 at most; small ones should keep their bits."""
CUDNN_FRONTEND = (1, 24), (2, 0)
"""Versions of nvidia-cudnn-frontend: from the first, below the second. 1.24 and 1.32 were looked at."""

# Reference.


def query_key_steps(q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """float32 [2]: the scales of queries and of keys without their mean, given the weights [D] of their
    norms."""
    bound = len(q_weight) ** 0.5 / FP8_MAX
    largest = torch.stack((q_weight.float().abs().amax(), 2 * k_weight.float().abs().amax()))
    return (bound * largest).clamp(min=1e-8)  # [2]


def qkv_to_fp8_reference(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    qk_steps: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`qkv_to_fp8` in plain torch."""
    q, k, q_weight, k_weight = (wide(x) for x in (q, k, q_weight, k_weight))
    q, k = qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, eps)  # [B,S,A,E] each
    k = k - k.mean(dim=1, keepdim=True)
    heads = wide(v).unflatten(-1, q.shape[2:])  # [B,S,A,E]
    v_step = heads.float().abs().amax().clamp(min=1e-8) / V_MAX
    steps = torch.cat((qk_steps, torch.stack((v_step, 1 / v_step))))  # [4]
    q8, k8, v8 = (to_float8(x / step) for x, step in zip((q, k, heads), steps, strict=False))
    return q8, k8, v8, steps


def fp8_attention_reference(q8: Tensor, k8: Tensor, v8: Tensor, steps: Tensor) -> Tensor:
    """`fp8_attention` in plain torch: [B,A,S,S] at once."""
    q, k, v = (x.float().transpose(1, 2) for x in (q8, k8, v8))  # [B,A,S,E] each
    logits = q @ k.transpose(-1, -2) * (steps[0] * steps[1] * q.shape[-1] ** -0.5)  # [B,A,S,S]
    p = torch.exp(logits - logits.amax(dim=-1, keepdim=True))  # [B,A,S,S]
    rounded = to_float8(p / PROBABILITY_STEP).float() * PROBABILITY_STEP
    return to_float8(rounded @ v / p.sum(dim=-1, keepdim=True)).transpose(1, 2).contiguous()  # [B,S,A,E]


# Triton.

ROWS = 64
"""Tokens that a program sums up."""


@triton.jit
def qkv_sums_kernel(
    k, v, k_weight, cos, sin, sums, largest, S, eps, k_b, k_s, v_b, v_s,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the sum of ROWS keys, normalised and rotated, and the largest of their values. sums
    [B,programs,D], largest [B,programs]."""
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    most = tl.zeros([BLOCK], tl.float32)
    for row in range(ROWS):
        token = (chunk * ROWS + row).to(tl.int64)
        if token < S:
            place = token * (E // 2)
            total += normed_rotated(
                k + batch * k_b + token * k_s, k_weight, cos + place, sin + place, D, E, eps, BLOCK
            )
            value = tl.load(v + batch * v_b + token * v_s + columns, mask=columns < D, other=0.0)
            most = tl.maximum(most, tl.abs(value.to(tl.float32)))
    where = batch * tl.num_programs(0) + chunk
    tl.store(sums + where * D + columns, total, mask=columns < D)
    tl.store(largest + where, tl.max(most, 0))


@triton.jit
def qkv_steps_kernel(
    sums, largest, qk_steps, mean, steps, S, CHUNKS, ALL,
    D: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """One program: the mean of WIDE channels; the first also the scales. mean [B,D], steps [4]."""
    batch = tl.program_id(1)
    columns = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros([WIDE], tl.float32)
    for first in range(0, CHUNKS, DEEP):
        rows = first + tl.arange(0, DEEP)
        place = sums + (batch * CHUNKS + rows[:, None]) * D + columns[None, :]
        total += tl.sum(tl.load(place, mask=(rows[:, None] < CHUNKS) & (columns[None, :] < D), other=0.0), 0)
    tl.store(mean + batch * D + columns, total / S, mask=columns < D)
    if (tl.program_id(0) == 0) & (batch == 0):
        most = tl.zeros([DEEP], tl.float32)
        for first in range(0, ALL, DEEP):
            rows = first + tl.arange(0, DEEP)
            most = tl.maximum(most, tl.load(largest + rows, mask=rows < ALL, other=0.0))
        step = tl.maximum(tl.max(most, 0), 1e-8) / 416.0
        tl.store(steps, tl.load(qk_steps))
        tl.store(steps + 1, tl.load(qk_steps + 1))
        tl.store(steps + 2, step)
        tl.store(steps + 3, 1.0 / step)


@triton.jit
def qkv_to_fp8_kernel(
    q, k, v, q_weight, k_weight, cos, sin, mean, steps, q8, k8, v8,
    S, eps, q_b, q_s, k_b, k_s, v_b, v_s,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One program: one token, its query (second index 0), its key (1) or its value (2). Outputs are
    contiguous."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // S, row % S
    cos += token * (E // 2)
    sin += token * (E // 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    if tl.program_id(1) == 0:
        value = normed_rotated(q + batch * q_b + token * q_s, q_weight, cos, sin, D, E, eps, BLOCK)
        tl.store(q8 + row * D + columns, to_fp8(value / tl.load(steps), ROUND), mask=inside)
    elif tl.program_id(1) == 1:
        value = normed_rotated(k + batch * k_b + token * k_s, k_weight, cos, sin, D, E, eps, BLOCK)
        value -= tl.load(mean + batch * D + columns, mask=inside, other=0.0)
        tl.store(k8 + row * D + columns, to_fp8(value / tl.load(steps + 1), ROUND), mask=inside)
    else:
        value = tl.load(v + batch * v_b + token * v_s + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(v8 + row * D + columns, to_fp8(value / tl.load(steps + 2), ROUND), mask=inside)


def qkv_to_fp8_triton(
    q8: Tensor, k8: Tensor, v8: Tensor, steps: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor,
    k_weight: Tensor, cos: Tensor, sin: Tensor, qk_steps: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches three kernels into q8, k8, v8 float8_e4m3fn [B,S,A,E] and steps float32 [4]; returns these."""
    batch, tokens, width = q.shape
    head, block = q8.shape[-1], power_of_two(width, 128, MAX_WIDTH)
    chunks, warps = -(-tokens // ROWS), 4 if block <= 2048 else 8
    mean = steps.new_empty((batch, width))
    sums, largest = steps.new_empty((batch, chunks, width)), steps.new_empty((batch, chunks))
    launch(
        qkv_sums_kernel, (chunks, batch),
        k, v, k_weight, cos, sin, sums, largest, tokens, eps, *k.stride()[:2], *v.stride()[:2],
        D=width, E=head, BLOCK=block, ROWS=ROWS, num_warps=warps, num_stages=1,
    )  # fmt: skip
    launch(
        qkv_steps_kernel, (-(-width // 32), batch),
        sums, largest, qk_steps, mean, steps, tokens, chunks, batch * chunks,
        D=width, WIDE=32, DEEP=64, num_warps=4, num_stages=1,
    )  # fmt: skip
    launch(
        qkv_to_fp8_kernel, (batch * tokens, 3),
        q, k, v, q_weight, k_weight, cos, sin, mean, steps, q8, k8, v8, tokens, eps,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        D=width, E=head, BLOCK=block, ROUND=INTERPRETED, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return q8, k8, v8, steps


# The torch op.


def _check(q: Tensor, *others: Any) -> None:
    cos, sin, qk_steps = others[4:7]
    for name, table in (("cos", cos), ("sin", sin)):
        require("qkv_to_fp8", table.is_contiguous(), f"{name} is not contiguous: pass {name}.contiguous()")
    message = f"cos and sin must be [S,1,E/2], E a divisor of {q.shape[-1]}, not {list(cos.shape)}"
    require("qkv_to_fp8", q.shape[-1] % (2 * cos.shape[-1]) == 0, message)
    require("qkv_to_fp8", len(qk_steps) == 2, "qk_steps must be float32 [2]: see query_key_steps")


def _empty(q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = 2 * others[4].shape[-1]
    shape = (*q.shape[:2], q.shape[2] // width, width)
    q8, k8, v8 = (q.new_empty(shape, dtype=torch.float8_e4m3fn) for _ in range(3))
    return q8, k8, v8, q.new_empty(4, dtype=torch.float32)


_qkv_to_fp8 = TorchOp(
    "qkv_to_fp8",
    "q BSD, k BSD, v BSD, q_weight D, k_weight D, cos float32 or wide S1R, sin float32 or wide S1R, "
    "qk_steps float32 N",
    scalars="float eps",
    outputs=4,
    reference=qkv_to_fp8_reference,
    cuda=lambda *arguments: qkv_to_fp8_triton(*_empty(*arguments), *arguments),
    empty=_empty,
    limits={"D": MAX_WIDTH},
    further=_check,
)


def qkv_to_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    qk_steps: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`qk_norm_rope` of q and k, the mean over tokens taken off the keys, and v, in float8_e4m3fn.

    q, k, v [B,S,D], as projected; weights [D]; cos and sin float32 [S,1,E/2]; qk_steps float32 [2] from
    `query_key_steps`. Returns three [B,S,A,E], and float32 [4]: what queries, keys and values are to be
    multiplied with, and 1 over the last. Raises ValueError for other shapes, dtypes or devices.
    """
    return _qkv_to_fp8(q, k, v, q_weight, k_weight, cos, sin, qk_steps, eps)


# cuDNN.


def fp8_attention(q8: Tensor, k8: Tensor, v8: Tensor, steps: Tensor) -> Quantised:
    """Softmax attention, scaled by 1/sqrt(E), of what `qkv_to_fp8` gives: float8_e4m3fn [B,S,A,E], to be
    multiplied with its scale float32 [1].

    On CUDA by cuDNN: `cudnn_attends` says whether it can. Elsewhere the reference.
    """
    if not q8.is_cuda:
        return Quantised(fp8_attention_reference(q8, k8, v8, steps), steps[2:3])
    out = _graph(q8.device.index, tuple(q8.shape))(q8, k8, v8, steps)
    return Quantised(out, steps[2:3])


@functools.cache
def cudnn_attends(device: torch.device, shape: tuple[int, ...]) -> bool:
    """Whether attention of this shape [B,S,A,E] can be in fp8: on the CPU by the reference; on a GPU by
    cuDNN, where it is there, takes the shape, and gives on small inputs what 16 bits give. Else one line of
    the log says why not.
    """
    if device.type != "cuda":
        return True
    reason = _why_not(device.index)
    if reason is None:
        try:
            _graph(device.index, shape)
        except Exception as error:  # the package has no common base of its own
            reason = f"cuDNN does not take {list(shape)}: {_short(error)}"
    if reason is not None:
        log.warning("self-attention stays in 16 bits: %s", reason)
    return reason is None


@functools.cache
def _why_not(index: int) -> str | None:
    """Why cuDNN does not attend in fp8 on the GPU of this number; the first call tries it on small inputs."""
    major, minor = torch.cuda.get_device_capability(index)
    if major < 9:
        return f"in fp8 it needs compute capability 9.0 or newer, this GPU has {major}.{minor}"
    try:
        module = cudnn()
    except ImportError as error:
        return str(error)
    try:
        error_found = _self_test(torch.device("cuda", index))
    except Exception as error:  # as above
        return f"cuDNN {module.backend_version()} failed on small inputs: {_short(error)}"
    if error_found <= RELATIVE_L2["attention8"]:
        return None
    return f"cuDNN {module.backend_version()} is wrong by {error_found:.2g} on small inputs"


@functools.cache
def cudnn() -> Any:
    """The package nvidia-cudnn-frontend. Raises ImportError, one line, where it is missing or of another
    version."""
    first, end = CUDNN_FRONTEND
    wanted = f"{'.'.join(map(str, first))} or newer, below {'.'.join(map(str, end))}"
    try:
        module = importlib.import_module("cudnn")
    except Exception as error:  # it loads a library when it is imported, which may fail in ways of its own
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cudnn"
        what = "is not installed" if missing else f"does not load ({_short(error)})"
        raise ImportError(f"nvidia-cudnn-frontend {what}: {how_to_install('fp8')}") from error
    version = str(getattr(module, "__version__", "0"))
    if not first <= tuple(map(int, re.findall(r"\d+", version)[:2])) < end:
        raise ImportError(f"nvidia-cudnn-frontend is {version}, {wanted} is needed: {how_to_install('fp8')}")
    return module


def build(module: Any, shape: tuple[int, ...], **options: Any) -> tuple[Any, dict[str, Any]]:
    """cuDNN's graph of attention in fp8 for [B,S,A,E], validated, and its tensors by name; module: `cudnn`;
    options: of its `pygraph`. Raises what that does for what it does not take."""
    batch, tokens, heads, width = shape
    eight, single = module.data_type.FP8_E4M3, module.data_type.FLOAT
    graph = module.pygraph(
        io_data_type=eight, intermediate_data_type=single, compute_data_type=single, **options
    )
    sizes = (batch, heads, tokens, width)  # in cuDNN's order; the strides say where tokens really are
    strides = (tokens * heads * width, width, heads * width, 1)
    names = ("descale_q", "descale_k", "descale_v", "scale_o", "scale_s", "descale_s")
    found = {n: graph.tensor(name=n, dim=sizes, stride=strides, data_type=eight) for n in ("q", "k", "v")}
    found |= {n: graph.tensor(name=n, dim=[1] * 4, stride=[1] * 4, data_type=single) for n in names}
    out, _, largest_s, largest_o = graph.sdpa_fp8(**found, attn_scale=width**-0.5, generate_stats=False)
    out.set_output(True).set_dim(sizes).set_stride(strides).set_data_type(eight)  # Hopper gives no other
    for name, tensor in (("largest_s", largest_s), ("largest_o", largest_o)):
        tensor.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(single)
        found[name] = tensor
    graph.validate()
    return graph, found | {"out": out}


class _Graph:
    """cuDNN's plan for one shape on one GPU. The current stream runs it, also where it is being captured."""

    def __init__(self, index: int, shape: tuple[int, ...]) -> None:
        module, device = cudnn(), torch.device("cuda", index)
        self._module, self._handle = module, _handle(index)
        self._graph, self._tensors = build(module, shape, handle=self._handle)
        self._graph.build_operation_graph()
        self._graph.create_execution_plans([module.heur_mode.A])
        self._graph.check_support()
        self._graph.build_plans()
        size = max(1, self._graph.get_workspace_size())
        self._workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self._fixed = torch.tensor([1 / PROBABILITY_STEP, PROBABILITY_STEP, 0.0, 0.0], device=device)

    def __call__(self, q8: Tensor, k8: Tensor, v8: Tensor, steps: Tensor) -> Tensor:
        out = torch.empty_like(q8)
        numbers = [*steps.split(1), *self._fixed.split(1)]
        names = ["descale_q", "descale_k", "descale_v", "scale_o"]
        names += ["scale_s", "descale_s", "largest_s", "largest_o"]
        given = dict(zip(names, numbers, strict=True)) | {"q": q8, "k": k8, "v": v8, "out": out}
        with torch.cuda.device(q8.device):
            self._module.set_stream(self._handle, torch.cuda.current_stream().cuda_stream)
            pointers = {self._tensors[name]: tensor.data_ptr() for name, tensor in given.items()}
            self._graph.execute(pointers, self._workspace.data_ptr(), handle=self._handle)
        return out


@functools.cache
def _graph(index: int, shape: tuple[int, ...]) -> _Graph:
    with torch.cuda.device(index):
        return _Graph(index, shape)


@functools.cache
def _handle(index: int) -> Any:
    with torch.cuda.device(index):
        return cudnn().create_handle()


def _self_test(device: torch.device) -> float:
    """The relative L2 error on small normal inputs, against float32; an odd length, as a video has."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 312, 256, generator=g).to(device, torch.bfloat16) for _ in range(3))
    ones, cos = torch.ones(256, device=device, dtype=torch.bfloat16), torch.ones(312, 1, 64, device=device)
    given = (q, k, v, ones, ones, cos, torch.zeros_like(cos))
    out, scale = fp8_attention(*qkv_to_fp8(*given, query_key_steps(ones, ones)))
    q, k = qk_norm_rope_reference(q.float(), k.float(), ones.float(), ones.float(), *given[5:], 1e-6)
    right = attention(q, k, v.float().unflatten(-1, (2, 128)))
    return float((out.float() * scale - right).norm() / right.norm())


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
