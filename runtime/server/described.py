"""What /openapi.json says beyond the routes' types: bodies that are read by hand, and what is answered."""

from __future__ import annotations

from typing import Any

from ...untrusted import printable
from ..request import MAX_GUIDANCE, MAX_SAMPLES, MAX_SEED
from ..solver import SHIFTS, SOLVERS, TRAINED_STEPS
from . import asked
from .jobs import STATUSES


def version() -> str:
    """Of the package."""
    from ... import __version__

    return printable(__version__)


def without_422(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's description of the API without its own errors: here they are 400."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema.get("components", {}).get("schemas", {}).pop(name, None)
    return schema


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _answer(description: str, schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": description, "content": {"application/json": {"schema": schema}}}}


_TEXT, _WHOLE, _NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_TIME = {"type": ["integer", "null"], "description": "seconds since 1970"}
_MAYBE = {"type": ["string", "null"]}
_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE, code=_MAYBE))
_VIDEO = _object(
    id=_TEXT,
    object={"const": "video"},
    model=_TEXT,
    status={"enum": list(STATUSES)},
    progress={"type": "integer", "minimum": 0, "maximum": 100},
    created_at=_WHOLE,
    started_at=_TIME,
    completed_at=_TIME,
    expires_at=_TIME,
    size=_MAYBE,
    seconds=_MAYBE,
    prompt=_TEXT,
    seed=_WHOLE,
    n=_WHOLE,
    options={"type": "object", "description": "what was asked for besides, by the names of POST"},
    labels={"type": "array", "items": _TEXT},
    queue_position={"type": ["integer", "null"]},
    step=_WHOLE,
    steps=_WHOLE,
    warnings={"type": "array", "items": _TEXT},
    timings={"type": "object", "additionalProperties": _NUMBER},
    error={"anyOf": [_object(code=_TEXT, message=_TEXT), {"type": "null"}]},
    remixed_from_video_id=_MAYBE,
)
_MODEL = _object(id=_TEXT, object={"const": "model"}, created=_WHOLE, owned_by=_TEXT)

_FILE = {"type": "string", "format": "binary"}
_WORDS = {"type": "string", "maxLength": asked.LONGEST_PROMPT}
_SCALE = {"type": "number", "minimum": 0, "maximum": MAX_GUIDANCE}
_BOX: dict[str, Any] = {
    "type": "array",
    "items": {"type": "number", "minimum": 0, "maximum": 1},
    "minItems": 4,
    "maxItems": 4,
    "description": "x0, y0, x1, y1 in fractions of the picture",
}
_BOXES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {
        "anyOf": [
            _BOX,
            {"type": "object", "patternProperties": {"^[0-9]+$": _BOX}, "additionalProperties": False},
        ]
    },
    "description": "where concepts are, by their labels: a box each, or boxes by video frame",
}
_FIELDS: dict[str, Any] = {
    "prompt": {**_WORDS, "minLength": 1},
    "model": {"type": "string", "description": "a bundle's name; without it the first of /v1/models"},
    "size": {"type": "string", "description": "the model's, which is fixed"},
    "seconds": {"type": "string", "description": "the model's, which is fixed"},
    "callback_url": {"type": "string", "format": "uri"},
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_SAMPLES},
    "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
    "steps": {"type": "integer", "minimum": 1, "maximum": TRAINED_STEPS},
    **dict.fromkeys(asked.NUMBERS, _SCALE),
    "shift": {"type": "number", "minimum": SHIFTS[0], "maximum": SHIFTS[1]},
    "negative_prompt": _WORDS,
    "solver": {"enum": list(SOLVERS)},
    "boxes": _BOXES,
    **dict.fromkeys(asked.IGNORED, {}),
}
_REFERENCE = {
    "type": "object",
    "properties": {
        "type": {"const": "image_url"},
        "image_url": _object(url={"type": "string", "description": "a data: URL in base64"}),
        "label": _TEXT,
    },
    "required": ["image_url"],
}
_FORM = {
    **_FIELDS,
    "boxes": {"contentMediaType": "application/json", "contentSchema": _BOXES, "type": "string"},
    "input_reference": {"type": "array", "items": _FILE, "maxItems": asked.MOST_PICTURES},
    "label": {"type": "array", "items": _WORDS, "description": "what each picture shows, in the same order"},
}
_JSON = {
    **_FIELDS,
    "input_reference": {"type": "string", "description": "a data: URL in base64; the same as one of them"},
    "label": _WORDS,
    "input_references": {"type": "array", "items": _REFERENCE, "maxItems": asked.MOST_PICTURES},
}


def _whole_object(properties: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {"type": "object", "properties": properties, "required": ["prompt"]}
    return {"schema": known | {"additionalProperties": False}}


CREATE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": _whole_object(_FORM), "application/json": _whole_object(_JSON)},
    }
}
SESSION: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": _object(key=_TEXT)}}}
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": {"application/json": {"schema": _ERROR}}}
    for status, what in (
        (400, "the request is wrong"),
        (401, "an API key is needed"),
        (403, "not allowed"),
        (404, "there is no such thing"),
        (408, "the body did not come to its end"),
        (409, "not in this state"),
        (410, "its files have expired"),
        (413, "too large"),
        (415, "neither a form nor JSON"),
        (421, "another host's name"),
        (429, "the queue is full"),
        (500, "a fault of the server"),
        (503, "too much at once, or stopping"),
        (507, "its disk is full"),
    )
}
VIDEO = _answer("the video", _VIDEO)
VIDEOS = _answer(
    "videos",
    _object(object={"const": "list"}, data={"type": "array", "items": _VIDEO}, has_more={"type": "boolean"}),
)
DELETED = _answer("done", _object(id=_TEXT, object={"const": "video.deleted"}, deleted={"type": "boolean"}))
MODEL = _answer("the model", _MODEL)
MODELS = _answer("models", _object(object={"const": "list"}, data={"type": "array", "items": _MODEL}))
FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "a file",
        "content": {kind: {"schema": _FILE} for kind in ("video/mp4", "image/webp", "image/png")},
    },
    206: {"description": "a part of a file"},
    304: {"description": "the file is the one that is there"},
    416: {"description": "there is no such part"},
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "server-sent events", "content": {"text/event-stream": {"schema": _TEXT}}}
}
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "a picture", "content": {"image/*": {"schema": _FILE}}},
    304: FILE[304],
}
SESSION_NOW = _answer("the page's session", _object(needed={"type": "boolean"}, name=_MAYBE))
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "not ready"}}
