"""A program of several commands.

Exit codes: 0 done; 1 failed (a damaged bundle, a missing package, a full disk); 2 wrong input; 130
interrupted (Ctrl-C), 143 terminated; 141 nobody reads its output any more. Wrong input gives one line on
standard error and nothing else, and no output is ever left half written.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import (
    ConceptMasterError,
    InputError,
    MissingDependency,
    RequestWarning,
    how_to_install,
    is_out_of_memory,
)
from ..untrusted import printable
from . import stop_signals, streams


@dataclass(frozen=True)
class Command:
    """A command: add_arguments(parser) declares its options and is called only when it is the one asked for;
    run(args) does it and returns the exit code; extra: what brings the packages that it needs."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    extra: str | None = None


def in_module(name: str, help: str, module: str, extra: str | None = None, function: str = "") -> Command:
    """A command of a module's functions add_arguments and run, or add_FUNCTION_arguments and run_FUNCTION;
    the module is imported only when the command is asked for. What its help does without is best imported
    by the functions that need it."""
    add, run = (f"add_{function}_arguments", f"run_{function}") if function else ("add_arguments", "run")

    def call(function: str, argument: Any) -> Any:
        return getattr(importlib.import_module(module), function)(argument)

    return Command(name, help, lambda parser: call(add, parser), lambda args: call(run, args), extra)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of printing its usage, and takes what begins with a
    minus and a digit for a value, as -0.1,0,1,1 of a box is: no option begins so."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        """Raises InputError with argparse's message."""
        raise InputError(f"{message} (see {self.prog} --help)")

    def unknown(self, arguments: Sequence[str]) -> NoReturn:
        """Raises InputError for arguments that no option takes."""
        name = arguments[0].partition("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, 1) if name[:1] == "-" else []
        meant = f"; is {near[0]} meant?" if near else ""
        self.error(f"unrecognized arguments: {' '.join(arguments)}{meant}")


class _Printable(logging.Formatter):
    """Messages hold names and labels that others chose: see `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record in lines that a terminal takes as text."""
        record.level = record.levelname.lower()
        return "\n".join(map(printable, super().format(record).splitlines()))


def run_program(
    prog: str, description: str, commands: Sequence[Command], argv: Sequence[str] | None = None
) -> int:
    """Runs one command and returns its exit code, see the module's text.

    Args: prog: how the program is called, its last part begins what it says; argv: the arguments. None:
    sys.argv's, and the process ends with the program.
    """
    name, arguments = prog.rpartition(".")[2], list(sys.argv[1:] if argv is None else argv)
    with stop_signals.raised(argv is None) as stops, streams.usable():
        try:
            try:
                code = _run(prog, description, commands, arguments, name)
            finally:  # also of --help, which ends in SystemExit
                unwritten = streams.finish(sys.stdout)
        except KeyboardInterrupt as stop:
            message, code = str(stop) or "interrupted", getattr(stop, "exit_code", 130)
        except ConceptMasterError as error:
            message, code = str(error), error.exit_code
        except BrokenPipeError as error:  # its own output's, or a process's that it has started?
            closed = unwritten or streams.nobody_reads()
            message, code = ("", streams.NOBODY_READS) if closed else (what_the_system_says(error), 1)
        except Exception as error:
            if is_out_of_memory(error):
                message, code = "out of memory", 1
            elif isinstance(error, OSError):
                message, code = what_the_system_says(error), 1
            elif stops.last is None:
                raise
            else:  # the signal went through a library that makes its own error of it
                message, code = "", 1
        else:
            message = ""
            if isinstance(unwritten, BrokenPipeError):
                code = streams.NOBODY_READS
            elif unwritten is not None:
                message, code = f"cannot write to standard output: {unwritten.strerror}", 1
        if stops.last is not None and code:
            message, code = str(stops.last), stops.last.exit_code
        if message:
            with suppress(OSError):
                print(f"{name}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
        streams.finish(sys.stderr)
    return code


def _run(prog: str, description: str, commands: Sequence[Command], arguments: list[str], name: str) -> int:
    """Parses the arguments and runs the command, with a log on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable(f"{name}: %(level)s: %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # standard error is full
    log = logging.getLogger(__package__.partition(".")[0] if __package__ else None)
    level = log.level
    log.addHandler(handler)
    try:
        args = _parse(prog, description, commands, arguments)
        if args.verbose:
            log.setLevel(logging.INFO)
        with _needing(args.asked), _requests_warned_of(log):
            return args.asked.run(args)
    finally:  # the caller may be a program of its own, and call again
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def _needing(command: Command | None) -> Iterator[None]:
    """Raises MissingDependency, which says how to install it, for a package that `command` lacks."""
    try:
        yield
    except ModuleNotFoundError as error:
        ours = __name__.partition(".")[0]
        if command is None or command.extra is None or (error.name or ours).partition(".")[0] == ours:
            raise  # a file of ours is missing, which no extra brings
        install = how_to_install(command.extra)
        raise MissingDependency(f"`{command.name}` needs {error.name}: {install}") from error


@contextmanager
def _requests_warned_of(log: logging.Logger) -> Iterator[None]:
    """Each RequestWarning is one line of the log, the same one once; other warnings are shown as ever."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, RequestWarning):
                log.warning("%s", message)
            else:
                show(message, category, *where, **more)

        warnings.simplefilter("default", RequestWarning)
        warnings.showwarning = shown
        yield


def what_the_system_says(error: OSError) -> str:
    """Why it refused, and of which file."""
    if error.strerror is None:
        return str(error)
    names = (error.filename, error.filename2)
    files = [os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)]
    return " → ".join(repr(file) for file in files) + (": " if files else "") + error.strerror


def _parse(
    prog: str, description: str, commands: Sequence[Command], arguments: Sequence[str]
) -> argparse.Namespace:
    """The arguments; of the commands only the one that they begin with is filled in."""
    from .. import __version__

    sub = parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"conceptmaster {__version__}")
    parser.set_defaults(verbose=False)
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    asked = None
    for command in commands:
        raw = argparse.RawDescriptionHelpFormatter
        each = choices.add_parser(command.name, help=command.help, allow_abbrev=False, formatter_class=raw)
        each.set_defaults(asked=command)
        if arguments and arguments[0] == command.name:
            asked, sub = command, each
    with _needing(asked):
        if asked is not None:
            asked.add_arguments(sub)
        args, unknown = parser.parse_known_args(arguments)
    if unknown:
        sub.unknown(unknown)
    for text in _texts(list(vars(args).values())):
        if "\0" in text:
            raise InputError(f"the argument {text!r} holds a null byte")
    return args


def _texts(value: Any) -> Iterator[str]:
    """Every string and path in what was parsed."""
    if isinstance(value, str | os.PathLike):
        yield str(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
