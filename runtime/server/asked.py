"""What a POST asks for, out of a form or of JSON: fields of OpenAI's video API and this engine's own.

`prompt`, `model`, `size`, `seconds`, `input_reference` are OpenAI's; as several pictures are the point here,
parts `input_reference` and `label` may be repeated, in the same order, or JSON has `input_references`. `n`,
`seed`, `steps`, `guidance`, `concept_guidance`, `guidance_2`, `negative_prompt`, `solver`, `shift`, `boxes`
(in a form as JSON) are this engine's request. A picture comes with the request: nothing is ever fetched.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...untrusted import parse_json
from ..boxes import BY_LABEL
from .catalogue import Served
from .refusals import Refused

WHOLE = {"n": "samples", "seed": "seed", "steps": "steps"}
NUMBERS = ("guidance", "concept_guidance", "guidance_2", "shift")
TEXTS = {"negative_prompt": "negative", "solver": "solver"}
IGNORED = ("user", "metadata", "quality")
"""Of OpenAI's clients, without a meaning here."""
OTHERS = (
    "prompt",
    "model",
    "size",
    "seconds",
    "input_reference",
    "input_references",
    "label",
    "callback_url",
    "boxes",
)
BY_FIELD = {own: name for name, own in {**WHOLE, **TEXTS, "input_reference": "concepts"}.items()}
"""What fields of runtime.Request are called here, where that differs."""
KNOWN = (*OTHERS, *WHOLE, *NUMBERS, *TEXTS, *IGNORED)
DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)
LARGEST_PICTURE = 32 * 2**20  # bytes
LARGEST_DATA_URL = LARGEST_PICTURE // 3 * 4 + 256
LONGEST_PROMPT = 10_000  # characters, also of a negative one and of a label
MOST_ITEMS = 10_000  # commas, brackets and braces of JSON: each value costs far more memory than its text
MOST_PICTURES = 16  # of a request, whatever its bundle takes


@dataclass(frozen=True)
class Asked:
    """A POST's fields, one value each but for pictures.

    values: the fields that are not pictures; pictures: what each shows (None: it does not say), and its
    file's bytes.
    """

    values: Mapping[str, Any]
    pictures: Sequence[tuple[str | None, bytes]] = field(default=())

    @property
    def model(self) -> str | None:
        """The bundle's name."""
        return _text(self.values, "model")

    @property
    def callback_url(self) -> str | None:
        """Who is to be told of the end."""
        return _text(self.values, "callback_url")

    def request(self, served: Served) -> dict[str, Any]:
        """Fields of runtime.Request but the concepts. Raises Refused for a field that is not understood."""
        for name, right in (("size", served.size), ("seconds", served.seconds)):
            said = self.values.get(name)
            if said is not None and not _same(str(said), right):
                raise Refused(
                    f"{name} must be {right} for the model {served.name!r}, whose shape is fixed, not "
                    f"{str(said)!r:.60}: leave it out",
                    param=name,
                )
        prompt = _text(self.values, "prompt")
        if prompt is None:
            raise Refused("a prompt is needed: say what happens in the video", param="prompt")
        found: dict[str, Any] = {"prompt": prompt}
        for name, own in WHOLE.items():
            if (whole := _whole(self.values, name)) is not None:
                found[own] = whole
        for name in NUMBERS:
            if (number := _number(self.values, name)) is not None:
                found[name] = number
        for name, own in TEXTS.items():
            if (text := _text(self.values, name)) is not None:
                found[own] = text
        if (boxes := _boxes(self.values)) is not None:
            found["boxes"] = boxes
        return found

    def labelled(self, served: Served) -> list[tuple[str, bytes]]:
        """The pictures with what they show. Raises Refused where that is needed and not said."""
        named = []
        for number, (label, data) in enumerate(self.pictures, 1):
            _text({"label": label}, "label")
            if not label and served.manifest.reads_labels:
                raise Refused(
                    f"picture {number} has no label: say what it shows, in the prompt's own words",
                    param="label",
                )
            named.append((label or f"picture {number}", data))
        return named


def parse(data: bytes) -> Any:
    """The value that a body of JSON says. Raises ValueError."""
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_ITEMS:
        raise ValueError("holds more values than any request needs")
    return parse_json(data)


def from_form(parts: Sequence[tuple[str, str | bytes]]) -> Asked:
    """Of a form: its texts, and its files as bytes, in their order. Raises Refused."""
    values: dict[str, Any] = {}
    labels: list[str] = []
    files: list[bytes] = []
    for name, value in parts:
        if name in ("input_reference", "input_reference[]"):
            files.append(_of_data_url(value) if isinstance(value, str) else value)
        elif isinstance(value, bytes):
            raise Refused(
                f"a file called {name!r:.60}: pictures are called input_reference", param="input_reference"
            )
        elif name in ("label", "label[]"):
            labels.append(value)
        elif name in values:
            raise Refused(f"{name!r:.60} is there twice", param=_param(name))
        else:
            values[name] = value
    _check_names(values)
    if labels and len(labels) != len(files):
        raise Refused(
            f"{len(files)} input_reference and {len(labels)} label: give each picture one, in the same order",
            param="label",
        )
    named: Sequence[str | None] = labels or [None] * len(files)
    return Asked(values, list(zip(named, files, strict=True)))


def from_json(value: Any) -> Asked:
    """Of a JSON object. Raises Refused."""
    if not isinstance(value, dict):
        raise Refused("the body must be a JSON object")
    _check_names(value)
    values = {name: v for name, v in value.items() if v is not None}
    several = values.pop("input_references", None)
    one, label = values.pop("input_reference", None), values.pop("label", None)
    if one is not None and several is not None:
        raise Refused("give input_reference or input_references, not both", param="input_references")
    listed = [{"image_url": one, "label": label} if not isinstance(one, dict) else {"label": label, **one}]
    entries = listed if one is not None else several if several is not None else []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Refused("input_references must be a list of objects", param="input_references")
    if len(entries) > MOST_PICTURES:
        raise Refused(
            f"{len(entries)} pictures, {MOST_PICTURES} are the most of any", param="input_references"
        )
    return Asked(values, [_picture(entry) for entry in entries])


def _picture(entry: dict[str, Any]) -> tuple[str | None, bytes]:
    label, image = entry.get("label"), entry.get("image_url")
    if label is not None and not isinstance(label, str):
        raise Refused("a label must be text", param="input_references")
    address = image.get("url") if isinstance(image, dict) else image
    if not isinstance(address, str):
        shape = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}, "label": "cat"}'
        raise Refused(f"a picture must be {shape}", param="input_references")
    return label, _of_data_url(address)


def _of_data_url(address: str) -> bytes:
    if (found := DATA_URL.match(address)) is None:
        raise Refused(
            f"pictures are not fetched, from {address!r:.60} neither: send a data: URL, or upload it",
            param="input_reference",
            code="remote_url_refused",
        )
    try:
        return base64.b64decode(address[found.end() :], validate=True)
    except ValueError:
        raise Refused("a picture's data: URL is not base64", param="input_reference") from None


def check_pictures(pictures: Sequence[tuple[str | None, bytes]]) -> None:
    """Raises Refused for one that is too large, before it is looked at."""
    for _, data in pictures:
        if len(data) > LARGEST_PICTURE:
            raise Refused(
                f"a picture has {len(data)} bytes, {LARGEST_PICTURE} are the most",
                status=413,
                code="too_large",
            )


def _check_names(values: Mapping[str, Any]) -> None:
    for name in values:
        if name not in KNOWN:
            raise Refused(f"unknown field {name!r:.60}; known are {', '.join(KNOWN)}", param=_param(name))


def param_of(field: str | None) -> str | None:
    """What a field of runtime.Request is called here."""
    return None if field is None else BY_FIELD.get(field, field)


def _param(name: str) -> str | None:
    return name if len(name) <= 60 and name.isascii() and name.isprintable() else None


def _same(said: str, right: str) -> bool:
    """As text, or as numbers that differ by less than half a second's worth of rounding."""
    if said == right:
        return True
    try:
        return abs(float(said) - float(right)) < 0.05
    except ValueError:
        return False


def _text(values: Mapping[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise Refused(f"{name} must be text, not {value!r:.60}", param=name)
    if value is not None and len(value) > LONGEST_PROMPT:
        raise Refused(
            f"{name} has {len(value)} characters, {LONGEST_PROMPT} are the most", param=name, code="too_long"
        )
    return value


def _whole(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value):
        value = int(value)
    if isinstance(value, bool) or not (value is None or isinstance(value, int)):
        raise Refused(f"{name} must be a whole number, not {value!r:.60}", param=name)
    return value


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise Refused(f"{name} must be a number, not {value!r:.60}", param=name) from None
    if isinstance(value, bool) or not (value is None or isinstance(value, (int, float))):
        raise Refused(f"{name} must be a number, not {value!r:.60}", param=name)
    return value


def _boxes(values: Mapping[str, Any]) -> Any:
    """An object, of a form as the JSON that says it; what is in it, a Request checks."""
    value = values.get("boxes")
    if isinstance(value, str):
        try:
            value = parse(value.encode()) if value.strip() else None
        except ValueError as error:
            raise Refused(f"boxes must be {BY_LABEL}: the text {error}", param="boxes") from None
    if value is not None and not isinstance(value, dict):
        raise Refused(f"boxes must be {BY_LABEL}, not {value!r:.60}", param="boxes")
    return value
