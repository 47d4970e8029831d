"""The errors a caller may meet, each with the command line's exit code for it, and the one warning."""

from __future__ import annotations


class ConceptMasterError(Exception):
    """Base of the errors below. `str(error)` is one line that says what is wrong and what to do about it."""

    exit_code = 1


class InputError(ConceptMasterError, ValueError):
    """The caller asked for something that cannot be done: a missing picture, an unknown solver, a bundle
    name that does not exist. Exit code 2."""

    exit_code = 2


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


class OutOfMemory(ConceptMasterError, MemoryError):
    """A request needs more memory than there is; the message says what would fit. Exit code 1."""


class RequestWarning(UserWarning):
    """A request that can be honoured, but hardly as it is meant: it asks for what the bundle was not made
    for. `str(warning)` is one line that says what and what to do about it. With `strict` it is an InputError.
    """
