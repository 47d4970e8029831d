"""The lean runtime: NumPy and one inference backend. Importing it loads nothing; each name loads on first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle as Bundle
    from .errors import BundleError as BundleError
    from .errors import Cancelled as Cancelled
    from .errors import InputError as InputError
    from .pipeline import Pipeline as Pipeline
    from .request import Concept as Concept
    from .request import Request as Request
    from .video import Video as Video

_HOMES = {
    "Bundle": "bundle",
    "BundleError": "errors",
    "Cancelled": "errors",
    "Concept": "request",
    "InputError": "errors",
    "Pipeline": "pipeline",
    "Request": "request",
    "Video": "video",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
