"""A bundle inside NVIDIA's Triton Inference Server: each graph is one of its models, this is the one around
them.

`conceptmaster export-triton` writes the models; the server imports `TritonPythonModel` from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as server

from ...errors import ConceptMasterError, GenerationError
from ..bundle_format.find import Bundle
from ..pipeline import Pipeline
from ..request import Concept, Request

OPTIONS = {"SEED": "seed", "STEPS": "steps", "GUIDANCE": "guidance"}


class ServerBackend:
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


class TritonPythonModel:
    """PROMPT, and LABELS and PICTURES of the concepts, to FRAMES."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the bundle that lies beside the server's model."""
        folder = Path(args["model_repository"], args["model_version"], "bundle")
        bundle = Bundle.open(folder)
        self.pipeline = Pipeline(bundle, ServerBackend(bundle))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers each request with its frames, or with one line that says what is wrong with it."""
        answers = []
        for request in requests:
            try:
                (video,) = self.pipeline.generate(_request(request))
                answers.append(server.InferenceResponse([server.Tensor("FRAMES", video.frames)]))
            except ConceptMasterError as error:
                answers.append(server.InferenceResponse([], server.TritonError(str(error))))
        return answers


def _request(request: Any) -> Request:
    given: dict[str, Any] = {}
    for name, field in OPTIONS.items():
        tensor = server.get_input_tensor_by_name(request, name)
        if tensor is not None:
            given[field] = tensor.as_numpy().reshape(-1)[0].item()
    (prompt,) = _texts(request, "PROMPT")
    labels = _texts(request, "LABELS")
    pictures = server.get_input_tensor_by_name(request, "PICTURES")
    images = [] if pictures is None else list(pictures.as_numpy())
    if len(labels) != len(images):
        raise GenerationError(f"{len(labels)} LABELS for {len(images)} PICTURES: one label for each picture")
    concepts = tuple(Concept(label, image) for label, image in zip(labels, images, strict=True))
    return Request(prompt, concepts, **given)


def _texts(request: Any, name: str) -> list[str]:
    tensor = server.get_input_tensor_by_name(request, name)
    return [] if tensor is None else [text.decode("utf-8") for text in tensor.as_numpy().reshape(-1)]


def _tensor(name: str, array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return server.Tensor(name, np.ascontiguousarray(array))
    return server.Tensor.from_dlpack(name, array)  # the same memory, under another name
