"""The files that a graph names are found wherever ONNX lets them stand, without onnx."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conceptmaster.runtime.bundle_format.external_data import locations

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def tensor(name: str) -> TensorProto:
    """A tensor whose values are in the file `name`."""
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    made.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", name), ("length", "4")):
        made.external_data.add(key=key, value=value)
    return made


def model() -> onnx.ModelProto:
    """A model with a tensor of values in a file wherever there may be one."""
    inner = helper.make_graph([], "inner", [], [], [tensor("in/a subgraph")])
    sparse = onnx.SparseTensorProto(values=tensor("sparse values"), indices=tensor("sparse indices"))
    several = onnx.AttributeProto(name="several", type=onnx.AttributeProto.TENSORS)
    several.tensors.extend([tensor("first of several"), tensor("second of several")])
    many = onnx.AttributeProto(name="many", type=onnx.AttributeProto.GRAPHS)
    many.graphs.extend([inner, helper.make_graph([], "last", [], [], [tensor("last")])])
    constant = helper.make_node("Constant", [], ["c"], value=tensor("constant"))
    scarce = helper.make_node("Constant", [], ["s"], sparse_value=sparse)
    branch = helper.make_node("If", ["c"], ["d"], then_branch=inner)
    branch.attribute.extend([several, many])
    nothing = numpy_helper.from_array(np.frombuffer(b"location", np.uint8), "location")
    graph = helper.make_graph([constant, scarce, branch], "g", [], [], [tensor("ünïcode"), nothing])
    graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor("sparse initializer")))
    in_function = helper.make_node("Constant", [], ["y"], value=tensor("function"))
    function = helper.make_function("d", "F", [], ["y"], [in_function], [helper.make_opsetid("", 20)])
    made = helper.make_model(graph, functions=[function], opset_imports=[helper.make_opsetid("", 20)])
    made.training_info.add().algorithm.initializer.append(tensor("training"))
    return made


def found(tmp_path: Path, data: bytes) -> set[str]:
    (tmp_path / "graph").write_bytes(data)
    return locations(tmp_path / "graph")


def named(message: object) -> set[str]:
    """The same by walking protobuf's own objects, whatever they are."""
    if isinstance(message, onnx.StringStringEntryProto):
        return {message.value} if message.key == "location" else set()
    values = [value for _, value in getattr(message, "ListFields", list)()]
    parts = [part for value in values for part in ([value] if hasattr(value, "ListFields") else _list(value))]
    return set().union(*map(named, parts))


def _list(value: object) -> list[object]:
    return [] if isinstance(value, (str, bytes, int, float)) else list(value)  # type: ignore[call-overload]


def test_every_place_is_found(tmp_path: Path) -> None:
    made = model()
    assert found(tmp_path, made.SerializeToString()) == named(made) and len(named(made)) == 11


def test_the_order_and_the_spelling_do_not_matter(tmp_path: Path) -> None:
    def part(field: int, data: bytes) -> bytes:
        return bytes([field << 3 | 2, 0x80 | len(data), 0]) + data  # a length that takes a byte too many

    entry = part(2, b"other") + part(1, b"offset") + part(2, b"w.data") + part(1, b"location")
    data = part(7, part(5, part(13, entry)))
    read = onnx.ModelProto.FromString(data).graph.initializer[0].external_data[0]
    assert (read.key, read.value) == ("location", "w.data")
    assert found(tmp_path, data) == {"w.data"}


def test_what_is_cut_off_or_is_no_protobuf_is_refused(tmp_path: Path) -> None:
    data = model().SerializeToString()
    for size in range(1, len(data), 7):
        try:
            onnx.ModelProto.FromString(data[:size])
        except Exception:
            with pytest.raises(ValueError, match=r"^(is cut off|is not a graph)$"):
                found(tmp_path, data[:size])
        else:
            found(tmp_path, data[:size])
    for bad in (b"no graph", b"\x0b\x0c", b"\xff" * 12, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01x"):
        with pytest.raises(ValueError, match="is cut off|is not a graph"):
            found(tmp_path, bad)
    assert found(tmp_path, b"") == set()


def test_a_file_of_crumbs_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conceptmaster.runtime.bundle_format.external_data.LARGEST", 1000)
    with pytest.raises(ValueError, match="has more than 1000 entries"):
        found(tmp_path, b"\x08\x01" * 1001)
