"""A bundle inside NVIDIA's Triton Inference Server: each graph is one of its models, this is the one around
them.

`conceptmaster export-triton` writes the models; the server imports `TritonPythonModel` from here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as server

from ...errors import ConceptMasterError, GenerationError, InputError
from ...untrusted import parse_json
from ..bundle_format.find import Bundle
from ..pipeline import Pipeline
from ..request import Concept, Request
from .graph_backend import GraphBackend

log = logging.getLogger(__name__)

OPTIONS = {"SEED": "seed", "STEPS": "steps", "GUIDANCE": "guidance", "GUIDANCE_2": "guidance_2"}


class ServerBackend(GraphBackend):
    """Runs graphs as the server's models of the same names; arrays are the server's tensors."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def load(self, graphs: Iterable[str]) -> None:
        """Nothing to do: the server has loaded its models."""

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs `graph`. inputs: NumPy arrays or what `run` returned. Raises KeyError, GenerationError."""
        signature = self._bundle.manifest.graphs[graph]
        request = server.InferenceRequest(
            model_name=graph,
            requested_output_names=[spec.name for spec in signature.outputs],
            inputs=[_tensor(spec.name, inputs[spec.name]) for spec in signature.inputs],
        )
        response = request.exec()
        if response.has_error():
            raise GenerationError(f"the server's model {graph} failed: {response.error().message()}")
        return {
            spec.name: server.get_output_tensor_by_name(response, spec.name) for spec in signature.outputs
        }

    def to_host(self, array: Any) -> np.ndarray:
        """A tensor (or NumPy array) as NumPy. Tensors are on the host: the configuration that export-triton
        writes asks for that (FORCE_CPU_ONLY_INPUT_TENSORS)."""
        return array if isinstance(array, np.ndarray) else array.as_numpy()

    def close(self) -> None:
        """Nothing: the graphs are the server's."""


class TritonPythonModel:
    """PROMPT, and LABELS, PICTURES and, as JSON, BOXES of the concepts, to FRAMES."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the bundle that lies beside the server's model."""
        folder = Path(args["model_repository"], args["model_version"], "bundle")
        bundle = Bundle.open(folder)
        self.pipeline = Pipeline(bundle, ServerBackend(bundle))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers each request with its frames, or with one line that says what is wrong with it: a request
        that cannot be answered takes no other one of the batch with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            (video,) = self.pipeline.generate(_request(request))
            return server.InferenceResponse([server.Tensor("FRAMES", video.frames)])
        except ConceptMasterError as error:
            return server.InferenceResponse([], server.TritonError(str(error)))
        except Exception as error:  # a fault of this program: the others' requests are answered all the same
            log.exception("a request failed")
            what = f"internal error: {type(error).__name__}: {error}"
            return server.InferenceResponse([], server.TritonError(what))


def _request(request: Any) -> Request:
    """The server's request as the pipeline takes it. Raises InputError."""
    arrays: dict[str, np.ndarray] = {}
    for tensor in request.inputs():
        if tensor.name() in arrays:
            raise InputError(f"{tensor.name()} is given twice")
        arrays[tensor.name()] = tensor.as_numpy()
    if "PROMPT" not in arrays:
        raise InputError("PROMPT is missing")
    options = {field: _one(name, arrays[name].flat) for name, field in OPTIONS.items() if name in arrays}
    labels, pictures = _texts("LABELS", arrays), arrays.get("PICTURES", ())
    if len(labels) != len(pictures):
        raise InputError(f"{len(labels)} LABELS for {len(pictures)} PICTURES: one label for each picture")
    concepts = tuple(Concept(label, picture) for label, picture in zip(labels, pictures, strict=True))
    if "BOXES" in arrays:
        text = _one("BOXES", _texts("BOXES", arrays))
        try:
            options["boxes"] = parse_json(text)
        except ValueError as error:
            raise InputError(f"BOXES {error}") from None
    return Request(_one("PROMPT", _texts("PROMPT", arrays)), concepts, **options)


def _one(name: str, values: Iterable[Any]) -> Any:
    found = list(values)
    if len(found) != 1:
        raise InputError(f"{name} must be one value, not {len(found)}")
    return found[0].item() if isinstance(found[0], np.generic) else found[0]


def _texts(name: str, arrays: Mapping[str, np.ndarray]) -> list[str]:
    try:
        return [text.decode("utf-8") for text in arrays.get(name, np.empty(0)).flat]
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None


def _tensor(name: str, array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return server.Tensor(name, np.ascontiguousarray(array))
    return server.Tensor.from_dlpack(name, array)  # the same memory, under another name
