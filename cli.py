"""The whole command line: the runtime's commands, and those that need PyTorch, loaded only when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .runtime import stop_signals

if TYPE_CHECKING:
    from .runtime.commands import Command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, see runtime/commands.py. argv: None for sys.argv's, and the
    process ends with the program."""

    def program() -> int:
        from .runtime import cli  # here, so that an interrupt is looked after before more is loaded

        return cli.main(argv, _exporting())

    return stop_signals.guarded("conceptmaster", argv is None, program)


def _exporting() -> list[Command]:
    """The commands of export/: `name` from the functions add_NAME_arguments and run_NAME of a module."""
    from .runtime.commands import in_module

    commands = (
        ("export", "turn weights into a bundle", "cli"),
        ("verify", "hold a bundle's graphs to the model they came from", "cli"),
        ("convert", "turn a pickled checkpoint into safetensors", "convert"),
        ("build", "build TensorRT engines from a bundle", "tensorrt_engines.cli"),
        ("export-triton", "write a model repository for NVIDIA's Triton server", "triton_server.cli"),
    )
    return [
        in_module(name, summary, f"{__package__}.export.{module}", "export", name.replace("-", "_"))
        for name, summary, module in commands
    ]
