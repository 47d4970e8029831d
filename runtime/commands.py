"""A program of several commands.

Exit codes: 0 done; 1 failed (a damaged bundle, a missing package, a full disk); 2 wrong input; 130
interrupted. Wrong input gives one line on standard error and nothing else, and no output is ever left half
written.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import ConceptMasterError, InputError, MissingDependency
from ..untrusted import printable


@dataclass(frozen=True)
class Command:
    """A command: add_arguments(parser) declares its options and is called only when it is the one asked for;
    run(args) does it and returns the exit code."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def in_module(name: str, help: str, module: str, extra: str | None = None, function: str = "") -> Command:
    """A command of a module's functions add_arguments and run, or add_FUNCTION_arguments and run_FUNCTION;
    the module is imported only when the command is asked for; ``extra`` brings the packages it needs."""
    add, run = (f"add_{function}_arguments", f"run_{function}") if function else ("add_arguments", "run")

    def find(function: str) -> Callable[[Any], Any]:
        try:
            return getattr(importlib.import_module(module), function)
        except ModuleNotFoundError as error:
            if extra is None or (error.name or "").partition(".")[0] == module.partition(".")[0]:
                raise  # a file of ours is missing, which no extra brings
            install = f"pip install 'conceptmaster[{extra}]'"
            raise MissingDependency(f"`{name}` needs {error.name}: {install}") from error

    return Command(name, help, lambda parser: find(add)(parser), lambda args: find(run)(args))


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError with argparse's message."""
        raise InputError(f"{message} (see {self.prog} --help)")


class _Printable(logging.Formatter):
    """Messages hold names and labels that others chose: see `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record in lines that a terminal takes as text."""
        return "\n".join(map(printable, super().format(record).splitlines()))


def run_program(
    prog: str, description: str, commands: Sequence[Command], argv: Sequence[str] | None = None
) -> int:
    """Runs one command and returns its exit code, see the module's text.

    Args: prog: how the program is called, its last part begins what it says; argv: the arguments, sys.argv's
    if None.
    """
    arguments, name = list(sys.argv[1:] if argv is None else argv), prog.rpartition(".")[2]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable(f"{name}: %(levelname)s: %(message)s"))
    log = logging.getLogger(__package__.partition(".")[0] if __package__ else None)
    log.addHandler(handler)
    message, code, level = "interrupted", 130, log.level
    try:
        args = _parser(prog, description, commands, arguments).parse_args(arguments)
        if args.verbose:
            log.setLevel(logging.INFO)
        return args.run(args)
    except ConceptMasterError as error:
        message, code = str(error), error.exit_code
    except MemoryError:
        message, code = "out of memory", 1
    except OSError as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        pass
    finally:  # the caller may be a program of its own, and call again
        log.removeHandler(handler)
        log.setLevel(level)
    print(f"{name}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _parser(
    prog: str, description: str, commands: Sequence[Command], arguments: Sequence[str]
) -> argparse.ArgumentParser:
    """The parser; only the command that `arguments` begins with is filled in."""
    from .. import __version__

    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"conceptmaster {__version__}")
    parser.set_defaults(verbose=False)
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for command in commands:
        raw = argparse.RawDescriptionHelpFormatter
        sub = choices.add_parser(command.name, help=command.help, allow_abbrev=False, formatter_class=raw)
        sub.set_defaults(run=command.run)
        if arguments and arguments[0] == command.name:
            command.add_arguments(sub)
    return parser
