"""Checks every kernel and the model on a GPU, and measures against their rivals those that are right.

    python -m conceptmaster.benchmarks.gpu [--output FILE] [--minutes 9] [--only PART …]     (`make gpu`)

The parts stand in suite.py in the order of what is wanted most; docs/performance.md says what each measures.
Prints a table; the report is FILE, written again after every line that is printed: hardware, clocks, watts,
versions, commit, the card's own matrix rate and copy bandwidth measured in the same run, and for every case
its shape, its error and milliseconds (p20, p50, p80) of ours and of each rival, timed in turn. What
`torch.compile` takes to compile is in none of them. What there was no time for is named. What is not right is
not timed, and nothing that fails keeps the rest from running; where the GPU itself is lost, a new process
goes on. `python -m conceptmaster.benchmarks.gpu.plot FILE` draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..reports import RESULTS, ROOT, write
from . import setting
from .card import no_fp8
from .case import COMPILE_MODE, Shapes
from .suite import PARTS, run
from .summary import summary

REPORT = RESULTS / "gpu.json"
REHEARSAL = ROOT / "out" / "gpu" / "rehearsal.json"
SCRATCH = ROOT / "out" / "gpu" / "scratch"
LEAST_MINUTES = 3.0


def main() -> int:
    """The command. Returns 1 when a check is red, something failed, or there is no GPU; 2 for wrong
    arguments."""
    start = time.monotonic()
    arguments = _parser().parse_args()
    if (reason := _refused(arguments)) is not None:
        print(reason, file=sys.stderr)
        return 1
    output: Path = arguments.output or (REHEARSAL if arguments.rehearse else REPORT)
    report: dict[str, Any] = {"rounds": setting.ROUNDS}
    if arguments.resume:
        report = json.loads(output.read_text("utf-8"))
    if arguments.commit:
        report["commit"] = arguments.commit

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {text}", flush=True)
        write(report, output)

    seconds = 60 * arguments.minutes
    device = "cpu" if arguments.rehearse else "cuda"
    shapes = Shapes(device, arguments.rehearse, mode=arguments.compile_mode, fp8=no_fp8() is None)
    if arguments.rehearse:
        setting.ROUNDS = 2
    scratch: Path = arguments.scratch or SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    run(shapes, seconds, say, tuple(arguments.only), report, scratch)
    write(report, output)
    if "stopped" in report and not report.get("resumed", 0) > 2:
        _in_a_new_process(arguments, output, report, seconds - (time.monotonic() - start))
    if arguments.scratch is None:
        shutil.rmtree(scratch, ignore_errors=True)
    print("\n".join([*summary(report), f"report: {output}"]), flush=True)
    return not report["ok"]


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the report (benchmarks/results/gpu.json)"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="nothing is begun that is not thought to end within them"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=tuple(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument(
        "--compile-mode", default=COMPILE_MODE, metavar="MODE", help="of torch.compile, e.g. "
        "max-autotune-no-cudagraphs, which takes minutes; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="for a base of some 10 GB, which stays there and is "
        "found again (out/gpu/scratch, and it is removed)",
    )  # fmt: skip
    parser.add_argument("--commit", help="of a copy that has no history beside it")
    parser.add_argument("--resume", action="store_true", help="go on with FILE, of a run that ended early")
    parser.add_argument(
        "--rehearse", action="store_true", help="all of it on the CPU at tiny sizes, to see that it works"
    )
    return parser


def _refused(arguments: argparse.Namespace) -> str | None:
    """Why nothing is begun, in one line; None where all is well."""
    if not arguments.rehearse and not torch.cuda.is_available():
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no GPU"
        return (
            f"{built}: run `make gpu` on a machine with an NVIDIA GPU (Hopper for the 8-bit kernels), with a "
            "CUDA build of PyTorch and `pip install '.[gpu]'`"
        )
    if not arguments.resume and not arguments.minutes >= LEAST_MINUTES:
        return f"--minutes {arguments.minutes:g} is too little: {LEAST_MINUTES:g} at least, 9 for all parts"
    return None


def _in_a_new_process(
    arguments: argparse.Namespace, output: Path, report: dict[str, Any], seconds: float
) -> NoReturn:
    """Goes on where the GPU was lost, in this one's place. What was running then counts as failed."""
    report["resumed"] = report.get("resumed", 0) + 1
    write(report, output)
    command = [sys.executable, "-m", "conceptmaster.benchmarks.gpu", "--resume"]
    command += ["--output", str(output), "--minutes", str(seconds / 60)]
    command += [] if arguments.scratch is None else ["--scratch", str(arguments.scratch)]
    command += ["--compile-mode", arguments.compile_mode, "--only", *arguments.only]
    os.execv(sys.executable, command)
