"""ConceptMaster: videos of several named, pictured things.

The public face, loaded when first asked for, so that ``import conceptmaster`` costs nothing:

* ``Concept`` -- a label and a picture of it;
* ``Pipeline`` -- a loaded bundle, called with a prompt and concepts;
* ``Request`` -- a prompt, its concepts and the options in one, also from a file, for ``Pipeline.generate``;
* ``Video`` -- what a pipeline returns: ``frames`` uint8 [F, H, W, 3] and ``save``;
* ``ConceptMasterError`` and the errors that derive from it, among them ``InputError`` and ``Cancelled``;
* ``RequestWarning`` -- what a pipeline warns with;
* ``__version__`` -- this package's version.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        BundleError,
        Cancelled,
        ConceptMasterError,
        ConfigError,
        ExportError,
        GenerationError,
        InputError,
        MissingDependency,
        OutOfMemory,
        RanksLost,
        RequestWarning,
        WeightsError,
    )
    from .runtime.pipeline import Pipeline
    from .runtime.request import Concept, Request
    from .runtime.video import Video

__version__ = "0.1.0"
__all__ = [
    "BundleError",
    "Cancelled",
    "Concept",
    "ConceptMasterError",
    "ConfigError",
    "ExportError",
    "GenerationError",
    "InputError",
    "MissingDependency",
    "OutOfMemory",
    "Pipeline",
    "RanksLost",
    "Request",
    "RequestWarning",
    "Video",
    "WeightsError",
    "__version__",
]

_HOMES = {
    "Concept": ".runtime.request",
    "Pipeline": ".runtime.pipeline",
    "Request": ".runtime.request",
    "Video": ".runtime.video",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in, once. Raises AttributeError for any other name."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, ".errors"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names of this module, with the public ones that are not loaded yet."""
    return sorted({*globals(), *__all__})
