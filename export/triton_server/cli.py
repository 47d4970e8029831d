"""The command `conceptmaster export-triton`, for the root's cli.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...runtime.bundle_format.find import Bundle
from ...runtime.bundle_format.tensorrt_engines import PRECISIONS
from .repository import find_engines, write_repository

TEXT = """\
Writes a model repository for NVIDIA's Triton Inference Server: a model for each graph, and one that calls
them.

  conceptmaster export-triton my-bundle models
  tritonserver --model-repository=models        # its Python needs this project: pip install .
"""


def add_export_triton_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `conceptmaster export-triton`."""
    parser.description = TEXT
    parser.add_argument("bundle", metavar="BUNDLE", help="shipped bundle or a path")
    parser.add_argument("output", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--engines", metavar="NAME", help="a folder of BUNDLE/engines: TensorRT instead of ONNX graphs"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="the same, by what the engines compute in (no engines)"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="for ONNX graphs (cpu)")


def run_export_triton(args: argparse.Namespace) -> int:
    """Writes it; returns the exit code 0. Raises InputError, BundleError."""
    bundle, engines = Bundle.open(args.bundle).with_graphs(), None
    if args.engines is not None or args.precision is not None:
        engines = find_engines(bundle, args.engines, args.precision)
    names = write_repository(bundle, args.output, engines, args.device)
    print(f"{args.output}: {', '.join(names)}")
    return 0
