"""The command `conceptmaster build`, for the root's cli.py. Its help needs neither PyTorch nor ONNX: what
does is imported when it runs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError
from ...runtime.bundle_format.find import Bundle
from ...runtime.bundle_format.tensorrt_engines import FLAVORS, PRECISIONS, target_capability
from ...runtime.progress import shown
from ...runtime.request import Request

if TYPE_CHECKING:
    from .builder_process import EngineSummary
    from .calibrate import Calibration

BUILD = """\
Builds TensorRT engines from a bundle's graphs, into BUNDLE/engines/. Build from an fp32 bundle: --precision
decides what products are computed in. For fp8, a short video is made on the CPU first, to know how large the
numbers become; the error that fp8 makes in it is printed.

  conceptmaster build my-bundle                                   # for the GPU here, in bf16
  conceptmaster build my-bundle --flavor rtx --target sm_89       # TensorRT for RTX; needs no GPU
  conceptmaster build my-bundle --trtexec --target sm_90 --dry-run   # only write engines/…/build.sh
  conceptmaster build my-bundle --trtexec --target sm_90 --collect   # take over what build.sh made
"""


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `conceptmaster build`."""
    parser.description = BUILD
    parser.add_argument("bundle", metavar="BUNDLE", help="shipped bundle or a path")
    parser.add_argument(
        "--target", metavar="sm_90", help="the GPU's compute capability (that of the GPU here)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of products (bf16)")
    parser.add_argument(
        "--request", metavar="FILE", type=Path, help="for fp8: what that video shows (made-up things)"
    )
    parser.add_argument("--flavor", choices=FLAVORS, default="tensorrt", help="which library (tensorrt)")
    parser.add_argument("--workspace", type=int, metavar="MB", help="memory that the builder may use")
    parser.add_argument("--level", type=int, choices=range(6), metavar="0-5", help="how long it searches")
    parser.add_argument("--trtexec", action="store_true", help="build with trtexec, by a script that is kept")
    parser.add_argument(
        "--trtexec-version", metavar="10.13", help="its version, if it is older than 10.15 (newer)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="with --trtexec: write the script, do not run it"
    )
    parser.add_argument(
        "--collect", action="store_true", help="with --trtexec: the script has been run by hand"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run_build(args: argparse.Namespace) -> int:
    """Builds; returns the exit code 0. Raises InputError, MissingDependency, ExportError, BundleError."""
    capability = None if args.target is None else target_capability(args.target)
    if args.workspace is not None and args.workspace < 1:
        raise InputError("--workspace is a number of megabytes, 1 at least")
    if (args.dry_run or args.collect or args.trtexec_version is not None) and not args.trtexec:
        raise InputError("--dry-run, --collect and --trtexec-version go with --trtexec")
    if args.trtexec_version is not None and not re.fullmatch(r"\d+(\.\d+)+", args.trtexec_version):
        raise InputError(f"--trtexec-version {args.trtexec_version!r}: write it as 10.13")
    if args.request is not None and args.precision != "fp8":
        raise InputError("--request goes with --precision fp8")
    if args.trtexec and args.flavor != "tensorrt":
        raise InputError("--trtexec builds with the full TensorRT: leave out --flavor, or --trtexec")
    bundle, show = Bundle.open(args.bundle).with_graphs(), shown(args.quiet)
    from . import build, trtexec
    from .build import Preparation
    from .builder import Limits, gpu_capability
    from .older_parsers import unknown_to

    build.check_place(bundle)
    limits = Limits(None if args.workspace is None else args.workspace << 20, args.level)
    if not args.trtexec:
        target = build.find_target(args.flavor, capability)
        how = Preparation(args.precision, _calibration(args, bundle, target))
        built = build.build_all(bundle, args.flavor, target, how, limits, show)
        return _report(args, *built, how.calibration)
    target = gpu_capability() if capability is None else capability
    calibration = None
    if not args.collect:
        calibration = _calibration(args, bundle, target)
        unknown = () if args.trtexec_version is None else unknown_to(args.trtexec_version)
        how = Preparation(args.precision, calibration, tuple(unknown))
        script = trtexec.write_script(bundle, target, how, limits, show)
        if args.dry_run:
            if calibration is not None:
                print(_error_line(calibration), file=sys.stderr)
            print(script)
            return 0
        trtexec.run_script(script)
    return _report(args, *trtexec.collect(bundle, target, args.precision), calibration)


def _calibration(args: argparse.Namespace, bundle: Bundle, capability: int) -> Calibration | None:
    if args.precision != "fp8":
        return None
    from . import build
    from .calibrate import calibrate

    build.require_fp8(capability)
    request = None if args.request is None else Request.from_json(args.request)
    return calibrate(bundle, request, shown(args.quiet))


def _report(
    args: argparse.Namespace,
    folder: Path,
    summaries: list[EngineSummary],
    calibration: Calibration | None,
) -> int:
    if args.json:
        error = {} if calibration is None else {"fp8_error": calibration.error}
        print(json.dumps({"folder": str(folder), "engines": [asdict(one) for one in summaries]} | error))
        return 0
    from .build import table

    print(table(summaries))
    if calibration is not None:
        print(_error_line(calibration))
    print(folder)
    return 0


def _error_line(calibration: Calibration) -> str:
    return f"fp8: a step's estimate of the latents is off by {calibration.error:.1%} at most (relative L2)"
