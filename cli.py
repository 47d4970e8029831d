"""The whole command line: the runtime's commands, and those that need PyTorch, loaded only when asked for."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from .errors import MissingDependency
from .runtime import cli

VERIFY = "hold a bundle's graphs to the model they came from, or its videos to a recorded score"
IDENTITY = "--identity"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (sys.argv's if argv is None); returns 0, 1 failed, 2 wrong input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # --identity makes another command of `verify`: neither loads the packages that only the other needs
    verify = _verify_identity() if IDENTITY in arguments else _verify_graphs()
    build = _exporting("build", "build TensorRT engines from a bundle", "build_cli")
    serving = _exporting("export-triton", "write a model repository for NVIDIA's Triton server", "triton_cli")
    return cli.main(arguments, [_exporting("export", "turn weights into a bundle"), verify, build, serving])


def _verify_graphs() -> cli.Command:
    command = _exporting("verify", VERIFY)

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        command.add_arguments(parser)
        _add_identity(parser)

    return dataclasses.replace(command, add_arguments=add_arguments)


def _verify_identity() -> cli.Command:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        from .examples.sprites.scoring.gate import add_verify_arguments

        add_verify_arguments(parser)
        _add_identity(parser)

    def run(args: argparse.Namespace) -> int:
        from .examples.sprites.scoring import gate

        return gate.run(args)

    return cli.Command("verify", VERIFY, add_arguments, run)


def _add_identity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        IDENTITY,
        action="store_true",
        help="hold its videos to the recorded score, not its graphs to the model: needs no PyTorch, takes "
        f"minutes, has options of its own (see verify {IDENTITY} --help)",
    )


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
