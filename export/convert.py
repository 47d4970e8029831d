"""The command `conceptmaster convert`: a pickled checkpoint of PyTorch becomes safetensors.

The pickle is opened in a process of its own (unpickling.py), by torch's `weights_only`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..atomic_write import check_output, replacing
from ..errors import ExportError, InputError
from ..untrusted import open_plain

DESCRIPTION = """\
Turns a checkpoint of PyTorch (.pth, .pt, .bin, .ckpt), which is a pickle, into safetensors: the same names,
shapes and dtypes. Nothing that the pickle asks for is executed: a file that holds more than tensors, numbers
and containers of them is refused. What is wrapped in "state_dict", "model" or "module" is taken out of it.

  conceptmaster convert Wan2.1_VAE.pth Wan2.1_VAE.safetensors
"""
CHILD = Path(__file__).with_name("unpickling.py")
MOST_NAMES = 6


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `conceptmaster convert`."""
    parser.description = DESCRIPTION
    parser.add_argument("source", metavar="FILE.pth", type=Path, help="the checkpoint")
    parser.add_argument("output", metavar="FILE.safetensors", type=Path, help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.add_argument("--quiet", action="store_true", help="no text on standard output")


def run_convert(args: argparse.Namespace) -> int:
    """Converts a file; returns the exit code 0. Raises InputError, ExportError, OSError."""
    source, output = args.source, args.output
    _check(source, output, args.overwrite)
    with replacing(output) as temporary:
        found = _converted(source, temporary)
    if not args.quiet:
        names = found["left_out"]
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        left_out = f"; no tensors, left out: {', '.join(names[:MOST_NAMES])}{more}" if names else ""
        print(f"{output}: {found['tensors']} tensors, {found['bytes'] / 1e6:,.1f} MB{left_out}")
    return 0


def _check(source: Path, output: Path, overwrite: bool) -> None:
    """Raises InputError for what can be seen to be wrong before anything is read."""
    try:
        open_plain(source).close()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read {str(source)!r}: {reason}") from None
    if source == output or output.exists() and os.path.samefile(source, output):
        raise InputError(f"the output is the file that is converted, {str(source)!r}: give another name")
    if source.suffix.lower() == ".safetensors":
        raise InputError(f"{str(source)!r} is safetensors already")
    check_output(output, (".safetensors",))
    if output.exists() and not overwrite:
        raise InputError(f"{str(output)!r} is there already: --overwrite replaces it")


def _converted(source: Path, output: Path) -> dict[str, Any]:
    """What unpickling.py says of its work. Raises InputError, ExportError; ModuleNotFoundError."""
    # -P: beside the program lie files that are called like other people's modules
    order = [sys.executable, "-P", str(CHILD), os.path.abspath(source), os.path.abspath(output)]
    done = subprocess.run(order, stdin=subprocess.DEVNULL, capture_output=True)  # killed where this ends
    said = done.stdout.decode("utf-8", "replace").strip().splitlines()
    if done.returncode or not said:
        how = f"ended with exit code {done.returncode}"
        if done.returncode < 0:
            how = f"was ended by {signal.Signals(-done.returncode).name}"
        if done.returncode == -signal.SIGKILL:
            how += ", for which a lack of memory is the usual reason"
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        told = f" ({last[0]:.200})" if last else ""
        raise ExportError(f"{str(source)!r} is not converted: the process that reads it {how}{told}")
    found: dict[str, Any] = json.loads(said[-1])
    if "missing" in found:
        raise ModuleNotFoundError(f"no {found['missing']}", name=found["missing"])
    if "refused" in found:
        raise InputError(f"{str(source)!r} {found['refused']}")
    if "failed" in found:
        raise ExportError(f"{str(source)!r} {found['failed']}")
    return found
