"""The whole command line: the runtime's commands, and those that need PyTorch, loaded only when asked for."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from .errors import MissingDependency
from .runtime import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (sys.argv's if argv is None); returns 0, 1 failed, 2 wrong input, 130 interrupted."""
    return cli.main(argv, COMMANDS)


def _exporting(name: str, summary: str, module: str = "cli") -> cli.Command:
    """The command `name`, from the functions add_NAME_arguments(parser) and run_NAME(args) of
    export/`module`.py."""
    function = name.replace("-", "_")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        _export_module(name, module, f"add_{function}_arguments")(parser)

    def run(args: argparse.Namespace) -> int:
        return _export_module(name, module, f"run_{function}")(args)

    return cli.Command(name, summary, add_arguments, run)


def _export_module(command: str, module: str, function: str) -> Any:
    try:
        return getattr(importlib.import_module(f".export.{module}", __package__), function)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"`conceptmaster {command}` needs {error.name}: pip install 'conceptmaster[export]'"
        ) from error


COMMANDS = (
    _exporting("export", "turn weights into a bundle"),
    _exporting("verify", "hold a bundle's graphs to the model they came from"),
    _exporting("build", "build TensorRT engines from a bundle", "tensorrt_engines.cli"),
    _exporting("export-triton", "write a model repository for NVIDIA's Triton server", "triton_server.cli"),
)
