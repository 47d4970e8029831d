"""The whole command line: the runtime's commands, and those that need PyTorch, loaded only when asked for."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from .runtime import cli
from .runtime.errors import ConceptMasterError, MissingDependency


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (sys.argv's if argv is None); returns 0, 1 failed, 2 wrong input, 130 interrupted."""
    return cli.main(
        argv,
        [
            _exporting("export", "turn weights into a bundle"),
            _exporting("verify", "hold a bundle's graphs to the model they came from"),
        ],
    )


def _exporting(name: str, summary: str) -> cli.Command:
    """The command `name`, from export/cli.py's functions add_NAME_arguments(parser) and run_NAME(args)."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        _export_module(name, f"add_{name}_arguments")(parser)

    def run(args: argparse.Namespace) -> int:
        command = _export_module(name, f"run_{name}")
        from .export.errors import ExportError

        try:
            return command(args)
        except ExportError as error:
            failed = ConceptMasterError(str(error))
            failed.exit_code = error.exit_code
            raise failed from error

    return cli.Command(name, summary, add_arguments, run)


def _export_module(command: str, function: str) -> Any:
    try:
        return getattr(importlib.import_module(".export.cli", __package__), function)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"`conceptmaster {command}` needs {error.name}: pip install 'conceptmaster[export]'"
        ) from error
