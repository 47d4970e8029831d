"""Triton to PTX ahead of time, for a GPU that need not be there: what TensorRT's plugin is made of."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ...errors import ExportError, InputError, MissingDependency, how_to_install
from ..onnx_graphs.concept_node import BIASED, BOXED, DECOUPLED, INJECTION

POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
OWN_POINTERS = {"mask": "*i1", "boxes": "*i1", "text_bias": "*fp32"}
_BOTH = ("q", "text_k", "text_v", "k", "v", "mask")
TENSORS = {INJECTION: ("q", "k", "v", "mask"), DECOUPLED: _BOTH, BIASED: (*_BOTH, "text_bias")}
TENSORS |= {BOXED + node: (*tensors, "boxes") for node, tensors in TENSORS.items()}
SIZES = {node: ("S", "T", "C") if "text_k" in tensors else ("S", "C") for node, tensors in TENSORS.items()}
MAX_WIDTH = 128  # the widest head that the kernel takes


@dataclass(frozen=True)
class Tiles:
    """One configuration: queries, and at most so many keys, to a tile; warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


# Tactic number, from 1, to configuration; TensorRT times them all. The last of each needs at most 48 KiB of
# shared memory, which every launcher grants unasked.
TACTICS = {
    2: (Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 1)),
    4: (Tiles(16, 32, 4, 2), Tiles(16, 32, 8, 3), Tiles(16, 16, 4, 1)),
}
"""By bytes of a number: 16 bits, float32."""


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU: its name in the PTX, threads of a block, bytes of shared memory."""

    name: str
    ptx: str
    threads: int
    shared: int
    tiles: Tiles


def tactics(dtype: str) -> tuple[Tiles, ...]:
    """The configurations for float32, float16 or bfloat16; number them from 1."""
    return TACTICS[4 if dtype == "float32" else 2]


def compile_node(
    node: str,
    dtype: str,
    heads: int,
    width: int,
    concepts: int,
    tiles: Tiles,
    capability: int,
    each: int = 0,
) -> Compiled:
    """Compiles a node's kernel for sm_`capability`.

    Args: node: of TENSORS; dtype: float32, float16 or bfloat16; width: E; concepts: C; each: keys of one
        concept where the node takes boxes, 0 elsewhere.
    Raises: MissingDependency without Triton, InputError where it is interpreted and for heads that are too
    wide, ExportError for a kernel that TensorRT cannot launch.
    """
    from ...kernels.boxes import MOST_CONCEPTS
    from ...kernels.common import INSTALLED, INTERPRETED, power_of_two

    if not INSTALLED:
        raise MissingDependency(f"the plugin's kernel needs Triton: {how_to_install('gpu')}")
    if INTERPRETED:
        raise InputError("the plugin's kernel cannot be compiled while TRITON_INTERPRET is set")
    if width > MAX_WIDTH:
        raise InputError(f"the plugin's kernel takes heads up to {MAX_WIDTH} wide, not {width}")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import plugin_kernels

    entry = {
        INJECTION: plugin_kernels.injection_entry,
        DECOUPLED: plugin_kernels.decoupled_entry,
        BIASED: plugin_kernels.biased_entry,
        BOXED + INJECTION: plugin_kernels.boxed_injection_entry,
        BOXED + DECOUPLED: plugin_kernels.boxed_decoupled_entry,
        BOXED + BIASED: plugin_kernels.boxed_biased_entry,
    }[node]
    pointer = POINTERS[dtype]
    signature = {name: OWN_POINTERS.get(name, pointer) for name in TENSORS[node]}
    signature |= dict.fromkeys(SIZES[node], "i32") | {"out": pointer}
    block_c = power_of_two(concepts, 16, tiles.keys)
    constants: dict[str, Any] = {
        "A": heads,
        "WIDTH": width,
        "SCALE": math.log2(math.e) / math.sqrt(width),
        "BLOCK_S": tiles.queries,
        "BLOCK_T": tiles.keys,
        "BLOCK_C": block_c,
        "BLOCK_E": power_of_two(width, 16, MAX_WIDTH),
        "EACH": each,
        "BLOCK_N": power_of_two(concepts // each, 1, MOST_CONCEPTS) if each else 1,
        "ONE_BLOCK": concepts <= block_c,
        "PRECISION": "tf32x3" if dtype == "float32" else "ieee",
    }
    # TensorRT aligns what it allocates to 256 bytes: without this there are no wide loads
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(signature.values())
        if kind.startswith("*") and kind != "*i1"
    }
    source = ASTSource(
        fn=entry,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=aligned,
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = only_parameters(found.asm["ptx"], len(signature))
    return Compiled(found.metadata.name, ptx, 32 * tiles.warps, found.metadata.shared, tiles)


def only_parameters(ptx: str, count: int) -> str:
    """PTX whose kernel takes its first `count` parameters and no others.

    Triton adds pointers to scratch memory, which these kernels do not use. TensorRT passes what the plugin
    declares and nothing behind it, so a launch would read past the end of its list. Raises ExportError when
    one of them is used.
    """
    header = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    if header is None:
        raise ExportError("the compiled kernel has no entry")
    parameters = header[1].split(",")
    for extra in parameters[count:]:
        name = extra.split()[-1]
        if len(re.findall(rf"\b{re.escape(name)}\b", ptx)) > 1:
            raise ExportError(f"the compiled kernel uses its parameter {name}, which TensorRT does not pass")
    kept = ",".join(parameters[:count])
    return ptx[: header.start(1)] + kept.rstrip() + "\n" + ptx[header.end(1) :]
