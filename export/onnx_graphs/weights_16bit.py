"""Weights in half the bytes where that loses nothing: 16 bits, and a Cast that gives them back in float32.

Weights that were trained or published in float16 or bfloat16 have these values in float32 too. ONNX Runtime
and TensorRT fold the Cast when they load a graph, so it computes what it computed, as fast as before.

Those of large models lie in a file beside their graph, written one after the other: no more than one of them
is in memory. Each begins at a multiple of ALIGNMENT, so that a loader can map it, and a matrix that the graph
only reads transposed is stored that way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from onnxscript import ir
from torch import Tensor, nn

from ...engine.checkpoints.lazy_weights import stored_weights
from ...runtime.progress import each

SMALLEST = 1024
"""Elements of the smallest tensor that is worth a node."""
ALIGNMENT = 4096
KINDS = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}
PROBE = 4096  # elements that tell, nearly always, that a tensor does not fit 16 bits
CHUNK = 2**24  # elements that are compared at a time
STORED = ".stored"  # behind the name of a weight: its values in 16 bits

Readers = Mapping[str, Callable[[], Tensor]]
"""What gives the values of a graph's large weights, float32, by the names of its initializers."""
Layout = Mapping[str, ir.TensorProtocol]
"""How these are stored, by the same names: in the file beside the graph, they say where."""


def data_file(path: Path) -> Path:
    """Where the weights of the graph at `path` are, if they are not in it."""
    return path.with_name(f"{path.name}.data")


def narrow_in_place(path: Path) -> bool:
    """Stores the weights inside the graph at `path` in 16 bits where these hold them; tells whether any are.

    A graph with its weights beside it is left as it is.
    """
    if data_file(path).exists():
        return False
    model, layout = ir.load(path), {}
    for name, value in model.graph.initializers.items():
        held = value.const_value
        if held is None or held.dtype != ir.DataType.FLOAT or held.size < SMALLEST:
            continue
        narrow = narrowed(torch.from_numpy(held.numpy().copy()))
        if narrow.dtype != torch.float32:
            layout[name] = ir.tensor(narrow, name=name)
    place(model, layout)
    if layout:
        made = {value for node in model.graph for value in node.outputs} - set(model.graph.outputs)
        for value in [*made, *model.graph.initializers.values()]:
            value.shape = value.type = None  # inferred anew by whoever loads the file
        ir.save(model, path)
    return bool(layout)


def weight_readers(module: nn.Module) -> Readers:
    """The large weights of a module, by name: those on disk and those in memory, as an adapter's are."""
    own = {
        name: parameter.detach
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.numel() >= SMALLEST
    }
    return own | {name: weight.read for name, weight in stored_weights(module).items()}


def hide(model: ir.Model, names: Iterable[str]) -> None:
    """Takes the values of these initializers away, so that no optimisation asks for them."""
    for name in names:
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = None


def turn(model: ir.Model, names: Iterable[str]) -> set[str]:
    """Drops the Transpose of every matrix out of these that is only read transposed; returns which.

    Their values are then the transposed ones. It is what the optimiser does where it has the values.
    """
    turned = set()
    for name in names:
        value = model.graph.initializers.get(name)
        users = [] if value is None else [node for node, _ in value.uses()]
        if value is None or not users or not all(_transposes(node) for node in users):
            continue
        for node in users:
            node.outputs[0].replace_all_uses_with(value)
            model.graph.remove(node, safe=True)
        turned.add(name)
    return turned


def write_weights(model: ir.Model, readers: Readers, turned: set[str], path: Path, show: bool) -> str:
    """Writes those weights that `model` has to data_file(path) and makes the model refer to them.

    Args: turned: see `turn`; path: of the graph, which is not written here; show: a progress bar on standard
        error. Returns the SHA-256 of the data file. Raises WeightsError for a file that cannot be read.
    """
    target, digest = data_file(path), hashlib.sha256()
    layout: dict[str, ir.ExternalTensor] = {}
    names = [name for name in readers if name in model.graph.initializers]
    with target.open("wb") as file:
        for name in each(names, f"{path.stem}: weights", show):
            tensor = readers[name]()
            tensor = narrowed(tensor.t() if name in turned else tensor)
            offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            for data in (bytes(offset - file.tell()), tensor.flatten().view(torch.uint8).numpy().data):
                file.write(data)
                digest.update(data)
            layout[name] = ir.ExternalTensor(
                target.name,
                offset,
                tensor.nbytes,
                KINDS[tensor.dtype],
                name=name,
                shape=ir.Shape(tensor.shape),
                base_dir=path.parent,
            )
            del tensor  # before the next is read
    place(model, layout)
    return digest.hexdigest()


def read_layout(model: ir.Model) -> Layout:
    """Where the weights of a model are that `write_weights` has put beside it."""
    return {
        name.removesuffix(STORED): value.const_value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def place(model: ir.Model, layout: Layout) -> None:
    """Makes these weights of `model` what `layout` says, with a Cast if need be."""
    for name, tensor in layout.items():
        value = model.graph.initializers[name]
        if tensor.dtype == ir.DataType.FLOAT:
            value.const_value = tensor
            continue
        stored = ir.Value(
            name=f"{name}{STORED}", const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
        )
        stored.const_value.name = stored.name
        model.graph.register_initializer(stored)
        for node, index in list(value.uses()):
            if node.op_type == "Gather" and index == 0:  # few rows of many: the Cast goes behind
                _widen_behind(node, stored)
        del model.graph.initializers[name]
        if value.uses():
            cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT}, name=f"{name}.Cast")
            model.graph.insert_before(model.graph[0], cast)
            value.replace_all_uses_with(cast.outputs[0])
            cast.outputs[0].name = name


def narrowed(tensor: Tensor) -> Tensor:
    """A float32 tensor in 16 bits, if one of the two kinds holds all of its values, else as it is."""
    tensor = tensor.contiguous()
    parts = tensor.flatten().split(CHUNK)
    for dtype in (torch.float16, torch.bfloat16):
        if not _holds(dtype, parts[0][:PROBE]):
            continue
        if all(_holds(dtype, part) for part in parts):
            return tensor.to(dtype)
    return tensor


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    return values.to(dtype).to(values.dtype).equal(values)


def _widen_behind(gather: ir.Node, stored: ir.Value) -> None:
    """Lets `gather` read `stored` and casts what it takes out."""
    gather.replace_input_with(0, stored)
    out = gather.outputs[0]
    cast = ir.node("Cast", [out], attributes={"to": ir.DataType.FLOAT}, name=f"{gather.name}.Cast")
    gather.graph.insert_after(gather, cast)
    cast.outputs[0].shape, cast.outputs[0].type = out.shape, out.type
    out.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, out)
    out.type = ir.TensorType(stored.const_value.dtype)


def _transposes(node: ir.Node) -> bool:
    """Whether a node swaps the axes of a matrix."""
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]
