"""The errors a caller may meet, each with the command line's exit code for it, and the one warning."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class ConceptMasterError(Exception):
    """Base of the errors below. `str(error)` is one line that says what is wrong and what to do about it."""

    exit_code = 1


class InputError(ConceptMasterError, ValueError):
    """The caller asked for something that cannot be done: a missing picture, an unknown solver, a bundle
    name that does not exist. Exit code 2.

    field: which one of a `runtime.Request` is wrong; None where it is not one of these.
    """

    exit_code = 2

    def __init__(self, message: str = "", *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(InputError):
    """A configuration that is out of range, contradicts itself, or asks for what the engine cannot honour."""


class WeightsError(InputError):
    """A weights file, or a set of weights, that does not fit; the message lists everything that is wrong."""


class ExportError(ConceptMasterError, RuntimeError):
    """A graph or an engine came out wrong, or could not be made. Exit code 1."""


class BundleError(ConceptMasterError, RuntimeError):
    """A bundle is there but cannot be trusted: a wrong hash, a missing part, an unknown format. Exit code
    1.
    """


class MissingDependency(ConceptMasterError, ImportError):
    """An optional package is not installed; the message names the command that installs it. Exit code 1."""


class GenerationError(ConceptMasterError, RuntimeError):
    """The model gave numbers that are no video (infinite or not a number). Exit code 1."""


class Cancelled(ConceptMasterError):
    """The caller's callback stopped the generation between two steps. Nothing was written. Exit code 1."""


class RanksLost(ConceptMasterError, RuntimeError):
    """Of several processes that make one request together one ended, hung, or is not like the others; what
    they had is lost, and the bundle must be opened again. Exit code 1."""


class OutOfMemory(ConceptMasterError, MemoryError):
    """A request needs more memory than there is; the message says what would fit. Exit code 1."""


class RequestWarning(UserWarning):
    """A request that can be honoured, but hardly as it is meant: it asks for what the bundle was not made
    for. `str(warning)` is one line that says what and what to do about it. With `strict` it is an InputError.
    """


_NO_MEMORY = (
    "bad_alloc",
    "memoryerror",
    "not enough memory",
    "out of memory",
    "outofmemory",
    "t allocate memory",  # cannot, can't
    "failed to allocate",
    "failed to map segment",  # of a library that is loaded
    "unable to allocate",
    "failed to create thread",  # whose stack did not fit
    "t start new thread",
    "cannot allocate",
    "cublas_status_alloc_failed",
    "bfcarena",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library, or what caused it, says that memory was short. Few have a type for
    it: ONNX Runtime's, PyTorch's on the CPU, the system's loader and Rust's say it in words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError):
            return True
        if isinstance(seen, OSError):  # its text may be a name that somebody chose
            if seen.errno == errno.ENOMEM:
                return True
        elif not isinstance(seen, ConceptMasterError):
            text = f"{type(seen).__name__} {seen}"[:2000].lower()
            if any(words in text for words in _NO_MEMORY):
                return True
        seen = seen.__cause__ or seen.__context__
    return False


def free_memory() -> int | None:
    """Bytes that programs may still take on this machine; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = [line for line in file if line.startswith("MemAvailable:")]
        return int(found[0].split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        return None


@contextmanager
def wrong_in(field: str) -> Iterator[None]:
    """What is raised in here as an InputError is about this field of a request."""
    try:
        yield
    except InputError as error:
        error.field = field
        raise


@contextmanager
def memory_errors(doing: str) -> Iterator[None]:
    """Whatever says in the block that memory is short becomes OutOfMemory; `doing`: what was tried."""
    try:
        yield
    except ConceptMasterError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise OutOfMemory(f"out of memory while {doing}{reason and f' ({reason:.200})'}") from error


def how_to_install(*extras: str) -> str:
    """The command that installs this project with these extras: no package index has it."""
    return f"in the project's folder, pip install '.[{','.join(extras)}]'"


def not_loaded(package: str, install: str, error: Exception) -> ConceptMasterError:
    """What to raise where importing `package` failed with `error`: something is missing, and `install` brings
    it; or all is there and something else went wrong, which installing does not mend; or memory was short."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_memory(error):
        return OutOfMemory(f"out of memory while {package} was loaded ({reason:.200})")
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return MissingDependency(f"{package} does not load, {error.name} is not installed: {install}")
    return MissingDependency(f"{package} is installed but does not load: {reason:.300}")
