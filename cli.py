"""The whole command line: the runtime's commands, and those that need PyTorch, loaded only when asked for."""

from __future__ import annotations

from collections.abc import Sequence

from .runtime import cli
from .runtime.commands import Command, in_module


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (sys.argv's if argv is None); returns 0, 1 failed, 2 wrong input, 130 interrupted."""
    return cli.main(argv, COMMANDS)


def _exporting(name: str, summary: str, module: str = "cli") -> Command:
    """The command `name`, from the functions add_NAME_arguments and run_NAME of export/`module`.py."""
    return in_module(name, summary, f"{__package__}.export.{module}", "export", name.replace("-", "_"))


COMMANDS = (
    _exporting("export", "turn weights into a bundle"),
    _exporting("verify", "hold a bundle's graphs to the model they came from"),
    _exporting("build", "build TensorRT engines from a bundle", "tensorrt_engines.cli"),
    _exporting("export-triton", "write a model repository for NVIDIA's Triton server", "triton_server.cli"),
)
