"""What 8 bits cost, part by part: on the shipped model's videos, and on Wan's shapes. No GPU is needed.

    python -m conceptmaster.benchmarks.tiers [--write] [--seeds N]

Every rung is a table of `engine/tiers.py` in the place of the tier `high`. Videos of N scenes with two
concepts of different nouns and N of the same are made by the torch backend with the references of the 8-bit
kernels, from the same noise as without 8 bits, and judged by the measures of the identity gate
(`examples/sprites/scoring/gate.py`): by how many points each fell, and how far the frames are. Then single
layers of Wan2.1 1.3B's shapes on normal numbers, against float64. Nothing is timed, so any machine
will do. `--write` also writes benchmarks/results/tiers.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conceptmaster import Pipeline
from conceptmaster.engine.tiers import PARTS, TIERS, EightBits
from conceptmaster.examples.sprites.scoring.gate import Scores, compare, measure_bundle
from conceptmaster.examples.sprites.scoring.score import Options
from conceptmaster.kernels.cross_attention import attention
from conceptmaster.kernels.fp8_attention import fp8_attention_reference, qkv_to_fp8, query_key_steps
from conceptmaster.kernels.fp8_linear import quantise_rows
from conceptmaster.kernels.qk_norm_rope import qk_norm_rope
from conceptmaster.runtime.backends.pytorch.options import TorchOptions
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.video import Video

from .lossy import BUNDLE, difference
from .reports import RESULTS, ROOT, commit, machine, write

REPORT = RESULTS / "tiers.json"
ALL = tuple(PARTS)
RUNGS = {
    "everything": EightBits(),
    **{f"{part} alone": EightBits(parts=(part,)) for part in ALL},
    "linear layers alone": EightBits(parts=tuple(part for part in ALL if part != "attention")),
    "but the first layer": EightBits(first_layers=1),
    "but the last layer": EightBits(last_layers=1),
    "but the first and the last layer": EightBits(first_layers=1, last_layers=1),
    "but the first step": EightBits(first_steps=1),
    "but the last step": EightBits(last_steps=1),
}

# Videos of the shipped model.


def judged(options: TorchOptions, seeds: int) -> tuple[Scores, np.ndarray]:
    """The gate's scores of so many scenes a row, and all frames uint8 [videos,F,H,W,3]."""
    pipeline, frames = Pipeline.from_bundle(BUNDLE, backend="torch", options=options), []

    def generate(request: Request) -> Video:
        video = pipeline.generate(request)[0]
        frames.append(video.frames)
        return video

    return measure_bundle(Options(seeds=range(seeds)), generate=generate), np.stack(frames)


def sweep(seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each of RUNGS."""
    exact, right = judged(TorchOptions(), seeds)
    before = TIERS["high"]
    for name, bits in RUNGS.items():
        TIERS["high"] = bits
        try:
            scores, frames = judged(TorchOptions(tier="high"), seeds)
        finally:
            TIERS["high"] = before
        measures = [dataclasses.asdict(line) for line in compare(exact, scores, 1.0)]
        row: dict[str, Any] = {"rung": name, "bits": dataclasses.asdict(bits), **difference(frames, right)}
        row |= {"measures": measures}
        print(_line(row), file=sys.stderr, flush=True)
        yield row


# Layers of Wan's shapes.

BITS = 14
"""Of a sum in Hopper's tensor cores, as DeepSeek-V3's report (arXiv 2412.19437, 3.3.2) has it."""
DEPTH = 32
"""Products of 8 bits that one instruction adds up."""


def fast_product(x8: Tensor, w8: Tensor) -> Tensor:
    """x8 [M,I] times w8 [O,I] transposed, float64 [M,O], by a sum that is cut to BITS after every DEPTH
    products: a model of what the tensor cores do, not a measurement."""
    total = torch.zeros(len(x8), len(w8), dtype=torch.float64)
    for x, w in zip(x8.double().split(DEPTH, 1), w8.double().split(DEPTH, 1), strict=True):
        total += x @ w.T
        mantissa, exponent = torch.frexp(total)
        total = torch.ldexp(torch.trunc(torch.ldexp(mantissa, torch.tensor(BITS))), exponent - BITS)
    return total


def linear_error(width: int, gelu: bool, fast: bool, rows: int = 64) -> float:
    """Relative L2 error of a layer of this input width to float64."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=g), torch.randn(rows, width, generator=g) * width**-0.5
    (x8, scale), (w8, w_scale) = quantise_rows(x, gelu), quantise_rows(weight)
    product = fast_product(x8, w8) if fast else x8.double() @ w8.double().T
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh") if gelu else x.double()
    return _relative_l2(product * scale.double() * w_scale.double().T, exact @ weight.double().T)


def attention_error(tokens: int = 32760, width: int = 128, queries: int = 64) -> float:
    """Relative L2 error of one head to float64, for some queries; a large mean is common to all keys."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, width, generator=g) for _ in range(3))
    k += 2 * torch.randn(width, generator=g)
    weight, angles = torch.ones(width), 6 * torch.randn(tokens, 1, width // 2, generator=g)
    given = q, k, v, weight, weight, angles.cos(), angles.sin()
    q8, k8, v8, steps = qkv_to_fp8(*given, query_key_steps(weight, weight))
    found = fp8_attention_reference(q8[:, :queries], k8, v8, steps).double() * steps[2]
    wide = [x.double() for x in given]
    exact_q, exact_k = qk_norm_rope(wide[0], wide[1], wide[3], wide[4], wide[5], wide[6])
    return _relative_l2(found, attention(exact_q[:, :queries], exact_k, v.double().unflatten(-1, (1, width))))


def layers() -> Iterator[dict[str, Any]]:
    """A row for each kind of layer."""
    for name, width, gelu in (("width 1536", 1536, False), ("GELU, width 8960", 8960, True)):
        for fast in (False, True):
            about = f"linear, {name}{', fast accumulation (modelled)' if fast else ''}"
            yield {"layer": about, "relative_l2": linear_error(width, gelu, fast)}
    yield {"layer": "self-attention, 32760 tokens", "relative_l2": attention_error()}


def _relative_l2(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


# The report.


def run(seeds: int) -> dict[str, Any]:
    """The report."""
    return {
        "bundle": BUNDLE,
        "videos": 2 * seeds,
        "machine": machine(),
        "commit": commit(),
        "command": "python -m conceptmaster.benchmarks.tiers --write",
        "layers": list(layers()),
        "rungs": list(sweep(seeds)),
    }


def table(report: dict[str, Any]) -> str:
    """For people, as in docs/performance.md; points are those that the worst measure of each row fell by."""
    lines = [
        "| in 8 bits | mean difference, 1/255 | PSNR, dB | identity, points | worst measure, points |",
        "| --- | --- | --- | --- | --- |",
        *map(_line, report["rungs"]),
        "",
        "| layer | relative L2 |",
        "| --- | --- |",
        *(f"| {row['layer']} | {row['relative_l2']:.2%} |" for row in report["layers"]),
    ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    identity = [100 * m["difference"] for m in row["measures"] if m["measure"] == "identity"]
    worst = min(row["measures"], key=lambda m: m["difference"])
    cells = [
        row["rung"],
        f"{row['mean_abs_255']:.2f}",
        f"{row['psnr_db']:.1f}",
        f"{np.mean(identity):+.1f}",
        f"{100 * worst['difference']:+.1f} ({worst['measure']}, {worst['row']})",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """The command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.relative_to(ROOT)}")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="scenes of each of two kinds (8)")
    arguments = parser.parse_args()
    report = run(arguments.seeds)
    if arguments.write:
        write(report, REPORT)
    print(table(report))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
