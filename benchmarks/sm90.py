"""Compiles every kernel for Hopper (sm_90a) without a GPU and reports registers, shared memory and spills.

    python -m conceptmaster.benchmarks.sm90 [--write]

prints the table; `--write` also writes benchmarks/results/sm90.json, which a test holds to the sources and to
the limits. What is compiled is what would be launched: the launchers run on tensors of the meta device, and
their launches are recorded with Triton's own specialisation of arguments.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .reports import RESULTS, ROOT, write

REPORT = RESULTS / "sm90.json"
MAX_SHARED = 232_448
"""Bytes of shared memory that a program may have; more compiles without a word and fails at launch."""

DTYPES = ("bfloat16", "float16", "float32")


def sources() -> dict[str, str]:
    """File of kernels/ -> SHA-256 of its functions under `@triton.jit` or `@gluon.jit`, and its launchers."""
    found = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        text = path.read_text("utf-8")
        parts = [
            ast.get_source_segment(text, node) or ""
            for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef)
            and (
                node.name.endswith("_triton")
                or any(".jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            )
        ]
        if parts:
            found[path.name] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return found


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """(what it is, a call that launches kernels): shapes of the shipped model and of Wan2.1, every dtype."""
    import torch

    for name in DTYPES:
        new = functools.partial(torch.empty, dtype=getattr(torch, name), device="meta")
        attention = (_attention_launches, _hopper_launches)
        for family in (*attention, _row_launches, _eight_bit_launches, _video_launches):
            yield from ((f"{case}, {name}", call) for case, call in family(new))


def _attention_launches(new: Callable[..., Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    import torch

    from conceptmaster.kernels.absorbed_injection import concept_weights_triton as weigh
    from conceptmaster.kernels.cross_attention_plain import cross_attention_triton as launch

    shapes = {
        "1.3B 480p": (2, 32760, 512, 64, 12, 128),
        "1.3B 480p, many concept tokens": (2, 32760, 512, 256, 12, 128),
        "few tokens": (2, 1024, 512, 64, 12, 128),
        "sprites": (2, 80, 48, 256, 12, 32),
        "odd": (1, 67, 33, 3, 3, 12),
    }
    for case, (batch, tokens, text, concepts, heads, width) in shapes.items():
        q, k, c = (new((batch, count, heads, width)) for count in (tokens, text, concepts))
        mask = torch.empty((batch, concepts), dtype=torch.bool, device="meta")
        rms, bias = (torch.empty((batch, count), device="meta") for count in (tokens, text))
        out = torch.empty_like(q)
        yield f"decoupled, {case}", functools.partial(launch, out, q, (k, k), (c, c), mask, rms)
        biased = functools.partial(launch, out, q, (k, k), (c, c), mask, rms, bias)
        yield f"decoupled with text bias, {case}", biased
        alone = functools.partial(launch, out, q, (k, k), None, None, rms, bias)
        yield f"text with bias, {case}", alone
        yield f"injection, {case}", functools.partial(launch, out, q, None, (c, c), mask, None)
        found = new((batch, tokens, heads * concepts))
        yield f"folded output, {case}", functools.partial(weigh, found, q, c, mask)
        if case in ("1.3B 480p", "sprites"):
            boxes = torch.empty((1, tokens, 4), dtype=torch.bool, device="meta")
            boxed = functools.partial(launch, out, q, (k, k), (c, c), mask, rms, bias, boxes)
            yield f"decoupled with text bias and boxes, {case}", boxed
            boxed = functools.partial(launch, out, q, None, (c, c), mask, None, None, boxes)
            yield f"injection with boxes, {case}", boxed
            yield f"folded output with boxes, {case}", functools.partial(weigh, found, q, c, mask, boxes)


def _hopper_launches(new: Callable[..., Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    import torch

    from conceptmaster.kernels.cross_attention_hopper import hopper_attention_triton as launch

    if new(1).dtype == torch.float32:
        return
    cases = {  # text tokens, concept tokens, head width; mask, inverse rms, bias
        "decoupled": (512, 64, 128, True, True, False),
        "decoupled, nothing masked": (512, 64, 128, False, False, False),
        "decoupled, padding one key": (96, 64, 128, True, True, True),
        "decoupled, 64 wide": (77, 64, 64, False, True, False),
        "text alone, padding one key": (96, 0, 128, False, False, True),
        "injection": (0, 64, 128, True, False, False),
        "injection, many concept tokens": (0, 256, 128, True, False, False),
    }
    batch, tokens, heads = 2, 32760, 12
    for case, (text, concepts, width, masked, scaled, biased) in cases.items():
        q, k, c = (new((batch, count, heads, width)) for count in (tokens, text, concepts))
        mask = torch.empty((batch, concepts), dtype=torch.bool, device="meta") if masked else None
        rms = torch.empty((batch, tokens), device="meta") if scaled else None
        bias = torch.empty((batch, text), device="meta") if biased else None
        sets = ((k, k) if text else None, (c, c) if concepts else None)
        out = torch.empty_like(q)
        yield f"Hopper, {case}", functools.partial(launch, out, q, *sets, mask, rms, bias)


def _eight_bit_launches(new: Callable[..., Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    import torch

    from conceptmaster.kernels.fp8_attention import qkv_to_fp8_triton
    from conceptmaster.kernels.fp8_linear import quantise_rows_triton

    for width in (1536, 8960, 13824):
        x8 = torch.empty((4096, width), dtype=torch.float8_e4m3fn, device="meta")
        scale = torch.empty((4096, 1), device="meta")
        for gelu in (False, True):
            call = functools.partial(quantise_rows_triton, x8, scale, new((4096, width)), gelu)
            yield f"fp8 rows of {width}{', GELU' if gelu else ''}", call
    for case, (heads, width) in {"14B": (40, 128), "1.3B": (12, 128)}.items():
        total = heads * width
        eight = torch.empty((2, 2048, heads, width), dtype=torch.float8_e4m3fn, device="meta")
        steps, pair = torch.empty(4, device="meta"), torch.empty(2, device="meta")
        x = new((2, 2048, 3 * total))[..., :total]
        table = torch.empty((2048, 1, width // 2), device="meta")
        weight = new((total,))
        yield (
            f"fp8 q, k, v, {case}",
            functools.partial(
                qkv_to_fp8_triton,
                eight,
                eight,
                eight,
                steps,
                x,
                x,
                x,
                weight,
                weight,
                table,
                table,
                pair,
                1e-6,
            ),
        )


def _row_launches(new: Callable[..., Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    import torch

    from conceptmaster.kernels.modulate import modulate_triton
    from conceptmaster.kernels.qk_norm_rope import inverse_rms_triton, qk_norm_rope_triton

    shapes = {"14B": (40, 128), "1.3B": (12, 128), "sprites": (12, 32)}
    for case, (heads, width) in shapes.items():
        x, weight, out = new((2, 2048, heads * width)), new((heads * width,)), new((2, 2048, heads, width))
        gate, scale, shift = torch.empty((2, 6, heads * width), device="meta").unbind(1)[:3]
        table, rms = torch.empty((2048, 1, width // 2), device="meta"), torch.empty((2, 2048), device="meta")
        yield (
            f"residual and modulation, {case}",
            functools.partial(modulate_triton, x, x, x, x, gate, scale, shift, True, 1e-6, weight),
        )
        yield (
            f"modulation, {case}",
            functools.partial(modulate_triton, x, None, x, None, None, scale, shift, True, 1e-6),
        )
        yield (
            f"norm and rotation, {case}",
            functools.partial(qk_norm_rope_triton, out, out, x, x, weight, weight, table, table, 1e-6),
        )
        yield f"inverse rms, {case}", functools.partial(inverse_rms_triton, rms, x, 1e-6)


def _video_launches(new: Callable[..., Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    from conceptmaster.kernels.causal_norm import causal_norm_triton as launch

    # (frames, positions, channels) of four latent frames at 832x480, and odd ones
    for frames, positions, channels in ((16, 399360, 96), (8, 24960, 384), (3, 35, 20)):
        case = f"{frames} frames, {positions} positions, {channels} channels"
        x, before, following, ahead = (new((n, positions, channels)) for n in (frames, 2, 2, frames + 2))
        vector = new((channels,))
        for name, rest in {
            "sum, norm and cache": (x, ahead, following, x, before, vector, vector, x),
            "norm and cache": (None, ahead, following, x, before, vector, vector, None),
            "cache": (None, ahead, following, x, before, None, None, None),
        }.items():
            yield f"{name}, {case}", functools.partial(launch, *rest)


def aim_at_hopper() -> None:
    """Makes Triton compile for sm_90, though there is no driver; for the rest of this process."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )


def compile_row(
    case: str, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """One line of the report. Raises RuntimeError when ptxas fails."""
    compiled = kernel.warmup(*arguments, grid=grid, **options)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"], "utf-8")
        command = [str(_ptxas()), "-v", "--gpu-name=sm_90a", str(source), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert registers and spills, done.stderr
    return {
        "case": case,
        "kernel": kernel.__name__,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "registers": int(registers[1]),
        "shared_bytes": compiled.metadata.shared,
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "tma": compiled.asm["ptx"].count("cp.async.bulk.tensor"),
        "serialised": "serialized" in done.stderr,  # ptxas waits after each wgmma: correct, but slow
    }


def _ptxas() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def report(wanted: str = "") -> dict[str, Any]:
    """Compiles the cases whose name has `wanted` in it; the report as it is written."""
    from conceptmaster.kernels.common import INTERPRETED, launches_to

    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled. Unset it")
    rows: list[dict[str, Any]] = []
    aim_at_hopper()
    for case, call in launches():
        if wanted not in case:
            continue

        def record(kernel: Any, grid: Any, *arguments: Any, case: str = case, **options: Any) -> None:
            rows.append(compile_row(case, kernel, grid, arguments, options))
            print(_line(rows[-1]), flush=True)

        with launches_to(record):
            call()
    return {
        "target": "sm_90a",
        "triton": importlib.metadata.version("triton"),
        "max_shared_bytes": MAX_SHARED,
        "command": "python -m conceptmaster.benchmarks.sm90 --write",
        "sources": sources(),
        "kernels": rows,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:56} {row['kernel']:28} {row['warps']:2} warps  {row['registers']:3} registers  "
        f"{row['shared_bytes']:7,} B shared  {row['spill_bytes']:5} B spilled  {row['wgmma']:3} wgmma  "
        f"{row['tma']:2} tma"
        f"{', serialised' if row['serialised'] else ''}"
    )


def bad(rows: list[dict[str, Any]]) -> list[str]:
    """The rows that spill or do not fit, as lines."""
    return [_line(row) for row in rows if row["spill_bytes"] or row["shared_bytes"] > MAX_SHARED]


def main() -> int:
    """The command. Returns 1 when a kernel spills or does not fit."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.relative_to(ROOT)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write needs every case")
    found = report(arguments.only)
    if arguments.write:
        write(found, REPORT)
    wrong = bad(found["kernels"])
    print("\n".join(["spilled, or too much shared memory:", *wrong]) if wrong else "no spills, all fit")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
