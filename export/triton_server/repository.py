"""A bundle as a model repository of NVIDIA's Triton Inference Server.

    OUT/denoise/config.pbtxt, OUT/denoise/1/model.onnx     each graph; with engines, 1/model.plan
    OUT/conceptmaster/config.pbtxt, 1/model.py, 1/bundle/   what calls them, from a prompt to frames

The graphs in 1/bundle/ are links to those of the models, where the file system has them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ...errors import InputError
from ...runtime.atomic_folder import link, replacing_folder
from ...runtime.bundle_format import manifest as manifests
from ...runtime.bundle_format import tensorrt_engines as stored
from ...runtime.bundle_format.find import Bundle
from ...runtime.bundle_format.schema import Manifest, TensorSpec
from ...runtime.bundle_format.tensorrt_engines import Engines
from ...runtime.frame_conditioning import lengths

KINDS = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}
NAME = "conceptmaster"
MODEL = (
    '"""What calls the other models: see conceptmaster."""\n\n'
    "from conceptmaster.runtime.backends.triton_server import TritonPythonModel\n\n"
    '__all__ = ["TritonPythonModel"]\n'
)


def write_repository(
    bundle: Bundle, output: Path, engines: Engines | None = None, device: str = "cpu"
) -> list[str]:
    """Writes the folder `output`, whole or not at all, which must not be there; returns the models' names.

    Args: engines: of `bundle`, to take the graphs' places (see `find_engines`); device: "cpu" or "gpu", where
        the server runs the ONNX graphs.
    Raises: InputError when `output` is taken; BundleError for engines that are not sound.
    """
    manifest = bundle.manifest
    if os.path.lexists(output):
        raise InputError(f"{str(output)!r} is there already: choose another place")
    plans = None if engines is None else stored.check(bundle, engines)
    with replacing_folder(output) as new:
        inner = new / NAME / "1" / "bundle"
        inner.mkdir(parents=True)
        for file in manifest.files():
            (inner / file.file).parent.mkdir(parents=True, exist_ok=True)
            with bundle.files.reading([file]) as path:
                shutil.copyfile(path, inner / file.file)
        manifests.save(manifest, inner)
        for name, graph in manifest.graphs.items():
            place = new / name / "1"
            place.mkdir(parents=True)
            if plans is None or engines is None:
                link(inner / graph.file, place / "model.onnx")
                for beside in graph.external:
                    link(inner / beside.file, place / beside.file)
            else:
                with plans.reading([engines.engines[name].hashed]) as path:
                    shutil.copyfile(path, place / "model.plan")
            text = graph_config(name, graph.inputs, graph.outputs, plans is not None, device)
            (new / name / "config.pbtxt").write_text(text, encoding="utf-8")
        (new / NAME / "1" / "model.py").write_text(MODEL, encoding="utf-8")
        (new / NAME / "config.pbtxt").write_text(pipeline_config(manifest), encoding="utf-8")
    return [NAME, *manifest.graphs]


def find_engines(bundle: Bundle, folder: str | None = None, precision: str | None = None) -> Engines:
    """The engines of `bundle` in the folder engines/`folder`, or the only ones in `precision`.

    Raises InputError when there are none or several, and for engines of TensorRT for RTX, which the server
    does not run.
    """
    found = stored.built(bundle.folder)
    fitting = [e for e in found if folder in (None, e.folder_name) and precision in (None, e.precision)]
    if folder is None:
        fitting = [e for e in fitting if e.flavor == "tensorrt"]
    if len(fitting) != 1:
        asked = " ".join(repr(word) for word in (folder, precision) if word is not None)
        there = ", ".join(e.folder_name for e in found) or "none"
        how_many = "no engines" if not fitting else "several engines, choose with --engines:"
        raise InputError(f"{how_many} {asked} in {str(bundle.folder)!r} (there are: {there})")
    if fitting[0].flavor != "tensorrt":
        raise InputError("Triton runs engines of the full TensorRT, not of TensorRT for RTX")
    return fitting[0]


def graph_config(
    name: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], plan: bool, device: str
) -> str:
    """config.pbtxt of one graph: fixed shapes, no batching."""
    kind = "KIND_GPU" if plan or device == "gpu" else "KIND_CPU"
    platform = "tensorrt_plan" if plan else "onnxruntime_onnx"
    lines = [f'name: "{name}"', f'platform: "{platform}"', "max_batch_size: 0"]
    lines += [_tensor("input", spec.name, KINDS[spec.dtype], spec.shape) for spec in inputs]
    lines += [_tensor("output", spec.name, KINDS[spec.dtype], spec.shape) for spec in outputs]
    lines.append(f"instance_group [ {{ count: 1 kind: {kind} }} ]")
    return "\n".join(lines) + "\n"


def pipeline_config(manifest: Manifest) -> str:
    """config.pbtxt of the model around them; LABELS, PICTURES and the rest may be left out."""
    s, (least, most) = manifest.shapes, lengths(manifest)
    frames = most if least == most else -1
    lines = [
        f'name: "{NAME}"',
        'backend: "python"',
        "max_batch_size: 0",
        _tensor("input", "PROMPT", "TYPE_STRING", (1,)),
        _tensor("input", "LABELS", "TYPE_STRING", (-1,), True),
        _tensor("input", "PICTURES", "TYPE_UINT8", (-1, -1, -1, 3), True),
        _tensor("input", "SEED", "TYPE_INT64", (1,), True),
        _tensor("input", "STEPS", "TYPE_INT64", (1,), True),
        _tensor("input", "GUIDANCE", "TYPE_FP32", (1,), True),
        *([] if manifest.experts is None else [_tensor("input", "GUIDANCE_2", "TYPE_FP32", (1,), True)]),
        *([_tensor("input", "BOXES", "TYPE_STRING", (1,), True)] if manifest.takes_boxes else []),
        _tensor("output", "FRAMES", "TYPE_UINT8", (frames, s.height, s.width, 3)),
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        'parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "yes" } }',
    ]
    return "\n".join(lines) + "\n"


def _tensor(side: str, name: str, kind: str, dims: Iterable[int], optional: bool = False) -> str:
    extra = " optional: true" if optional else ""
    return f"{side} [ {{ name: {json.dumps(name)} data_type: {kind} dims: {list(dims)}{extra} }} ]"
