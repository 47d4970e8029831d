"""The nodes of concept_node.py as TensorRT plugins whose kernel is this project's Triton code, compiled ahead
of time.

An engine holds the PTX, so it runs in C++ and in trtexec without Python. Only who builds it needs this
module: `register(trt)` before a graph is parsed. TensorRT for RTX has no such plugins, and there the body
stands.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from ...errors import MissingDependency, how_to_install
from ..onnx_graphs.concept_node import DOMAIN
from .aot import SIZES, TENSORS, compile_node, tactics
from .builder import gpu_capability

NAMES = {"FLOAT": ("FP32", "float32"), "HALF": ("FP16", "float16"), "BF16": ("BF16", "bfloat16")}
"""TensorRT's name of a dtype -> its name in a type combination, and here."""


OWN_KINDS = {"mask": "BOOL", "boxes": "BOOL", "text_bias": "FP32"}


def register(trt: Any, capability: int | None = None) -> None:
    """Registers the plugins with the full library, for sm_`capability` (None: the GPU that is there).

    Registering twice does nothing. Raises MissingDependency without Triton or without tensorrt.plugin.
    """
    from ...kernels.common import INSTALLED

    if not INSTALLED:
        raise MissingDependency(f"the plugin's kernel needs Triton: {how_to_install('gpu')}")
    try:
        plugins = importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError as error:
        raise MissingDependency(f"this TensorRT has no plugins in Python ({error})") from error
    target = gpu_capability() if capability is None else capability
    for node in TENSORS:
        if not hasattr(getattr(plugins.op, DOMAIN, None), node):
            _register(trt, plugins, node, target)


def _register(trt: Any, plugins: Any, node: str, capability: int) -> None:
    identity = f"{DOMAIN}::{node}"

    def describe(*given: Any) -> Any:
        return given[0].like()  # out is like q

    def autotune(*given: Any) -> Any:
        name, dtype = NAMES[given[0].dtype.name]
        kinds = [OWN_KINDS.get(tensor, name) for tensor in TENSORS[node]] + [name]
        numbers = list(range(1, len(tactics(dtype)) + 1))
        return [plugins.AutoTuneCombination(", ".join(kinds), "LINEAR", numbers)]

    def compiled(*given: Any) -> Any:
        *inputs, heads, _outputs, tactic = given
        shapes = {name: tensor.shape_expr for name, tensor in zip(TENSORS[node], inputs, strict=True)}
        dtype = NAMES[inputs[0].dtype.name][1]
        choices = tactics(dtype)
        tiles = choices[tactic - 1 if tactic else 1]  # no tactic: the one that fits every GPU
        width = shapes["q"][2].constant_value() // heads
        concepts = shapes["k"][1].constant_value()
        each = concepts // shapes["boxes"][2].constant_value() if "boxes" in shapes else 0
        kernel = compile_node(node, dtype, heads, width, concepts, tiles, capability, each)
        launch = plugins.KernelLaunchParams()
        launch.grid_x = plugins.cdiv(shapes["q"][1], tiles.queries)
        launch.grid_y = shapes["q"][0] * heads
        launch.block_x = kernel.threads
        launch.shared_mem = kernel.shared
        sizes = {"S": shapes["q"][1], "C": shapes["k"][1]}
        if "text_k" in shapes:
            sizes["T"] = shapes["text_k"][1]
        extra = plugins.SymIntExprs(len(SIZES[node]))
        for index, letter in enumerate(SIZES[node]):
            extra[index] = plugins.SymInt32(sizes[letter])
        return kernel.name, kernel.ptx, launch, extra

    # TensorRT reads what a plugin takes and gives from its functions' signatures, as objects, not as text.
    tensors = [(name, plugins.TensorDesc) for name in TENSORS[node]]
    attributes = [("heads", int)]
    outputs = [("outputs", tuple[plugins.TensorDesc])]
    gives = tuple[str | bytes, str | bytes, plugins.KernelLaunchParams, plugins.SymIntExprs]
    _sign(describe, [*tensors, *attributes], plugins.TensorDesc)
    _sign(autotune, [*tensors, *attributes, *outputs], list[plugins.AutoTuneCombination])
    _sign(compiled, [*tensors, *attributes, *outputs, ("tactic", int)], gives)
    plugins.register(identity)(describe)
    plugins.autotune(identity)(autotune)
    plugins.aot_impl(identity)(compiled)


def _sign(function: Any, parameters: list[tuple[str, Any]], returns: Any) -> None:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters],
        return_annotation=returns,
    )
