"""GGUF files, written by the gguf package, against its own quantiser and reader; and hostile ones."""

from __future__ import annotations

import struct

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from conceptmaster.engine.checkpoints import gguf_file  # noqa: E402
from conceptmaster.engine.checkpoints.gguf_file import read_gguf  # noqa: E402
from conceptmaster.errors import ConceptMasterError, WeightsError  # noqa: E402

KINDS = gguf.GGMLQuantizationType
PLAIN = {KINDS.F32: np.float32, KINDS.F16: np.float16, KINDS.F64: np.float64}


def write(path, tensors, **entries):
    """A file of (values, type) by name; bytes are written as they are."""
    writer = gguf.GGUFWriter(path, "wan")
    for key, value in entries.items():
        writer.add_array(key.replace("__", "."), value)
    for name, (values, kind) in tensors.items():
        data = values if values.dtype == np.uint8 else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantisable():
    """The types of blocks that the package dequantises."""
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except (NotImplementedError, AttributeError, ValueError):
            continue
        if kind not in PLAIN:
            yield kind


@pytest.mark.parametrize("kind", list(dequantisable()), ids=lambda kind: kind.name)
def test_blocks_of_every_type_are_what_the_package_says(kind, tmp_path, monkeypatch):
    """Random bytes are blocks, too; some at a time, which must not show."""
    monkeypatch.setattr(gguf_file, "CHUNK", 1024)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    g = np.random.default_rng(0)
    try:
        data = gguf.quants.quantize(g.standard_normal((7, 2 * block), np.float32), kind)
    except NotImplementedError:
        data = g.integers(0, 60, (7, 2 * size), np.uint8)  # no number in it is large
    path = write(tmp_path / "a.gguf", {"a.weight": (data, kind)})
    tensor = read_gguf(path)[0]["a.weight"]
    expected = torch.from_numpy(gguf.dequantize(data, kind))
    assert tensor.shape == expected.shape == (7, 2 * block) and expected.isfinite().all()
    if kind == KINDS.BF16:
        assert tensor.dtype == torch.bfloat16 and tensor.read().equal(expected)
    elif expected.to(torch.float16).isfinite().all():
        assert tensor.load().dtype == torch.float16
        assert tensor.read().equal(expected.to(torch.float16).float())
    else:
        assert tensor.read().equal(expected)


def test_plain_tensors_and_the_header_are_those_of_the_package_s_reader(tmp_path):
    g = np.random.default_rng(0)
    tensors = {
        "patch_embedding.weight": (g.standard_normal((4, 24), np.float32), KINDS.F32),
        "five": (g.standard_normal((2, 3, 1, 2, 2), np.float32), KINDS.F16),
        "norm": (g.standard_normal(5, np.float32), KINDS.F32),
        "q": (g.standard_normal((3, 64), np.float32), KINDS.Q8_0),
    }
    shape = {"comfy__gguf__orig_shape__patch_embedding__weight": [4, 6, 1, 2, 2]}
    found, metadata = read_gguf(write(tmp_path / "a.gguf", tensors, **shape))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert list(found) == [tensor.name for tensor in reader.tensors]
    assert metadata["general.architecture"] == "wan"
    assert found["patch_embedding.weight"].shape == (4, 6, 1, 2, 2) and found["five"].shape == (2, 3, 1, 2, 2)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(
            np.float16 if tensor.name == "q" else "f4"
        )
        mine = found[tensor.name].read().numpy()
        assert np.array_equal(mine.ravel(), values.ravel().astype("f4")), tensor.name
        if tensor.name != "patch_embedding.weight":
            assert mine.shape == tuple(reversed(tensor.shape.tolist()))
    kinds = {name: tensor.kind for name, tensor in found.items()}
    assert kinds == {"patch_embedding.weight": "F32", "five": "F16", "norm": "F32", "q": "F16"}


def test_what_float16_does_not_hold_stays_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "CHUNK", 64)
    values = np.ones((4, 64), np.float32)
    values[2] = 1e6
    found = read_gguf(write(tmp_path / "a.gguf", {"a": (values, KINDS.Q8_0)}))[0]["a"].read()
    assert found[:2].equal(torch.ones(2, 64)) and found[2].min() > 9e5


def test_a_file_that_is_replaced_is_noticed(tmp_path):
    tensors = {"a": (np.ones((4, 32), np.float32), KINDS.Q8_0)}
    found = read_gguf(write(tmp_path / "a.gguf", tensors))[0]["a"]
    write(tmp_path / "b.gguf", tensors).replace(tmp_path / "a.gguf")
    with pytest.raises(WeightsError, match="was changed while it was in use"):
        found.read()


# Hostile files.


def header(entries=(), infos=(), count=None, version=3, magic=b"GGUF"):
    """A file's bytes: entries are raw; infos are (name, shape, type, offset)."""
    data = magic + struct.pack("<IQQ", version, len(infos) if count is None else count, len(entries))
    data += b"".join(entries)
    for name, shape, kind, offset in infos:
        data += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return data


def text(value):
    return struct.pack("<Q", len(value)) + value


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def padded(data, size=256):
    return data + bytes(-len(data) % 32) + bytes(size)


NESTED = struct.pack("<IQ", 9, 1) * 3
ONE = [(b"a", (4, 4), 0, 0)]
ORIGINAL = b"comfy.gguf.orig_shape.a"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off"),
        (b"GGUF", "cut off"),
        (header(magic=b"GGML"), "does not begin with GGUF"),
        (header(version=1), "of version 1"),
        (header(version=50331648), "of version 50331648"),  # big-endian
        (header(count=2**60), "tells of 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "more than 65536"),
        (header(count=5), "cut off"),
        (header(entries=[text(b"a" * 2000)]), "a text of 2000 bytes"),
        (header(entries=[struct.pack("<Q", 2**62)]), "a text of 4611686018427387904 bytes"),
        (header(entries=[entry(b"a", 8, struct.pack("<Q", 2**40))]), "a text of 1099511627776 bytes"),
        (
            header(entries=[entry(b"a", 9, struct.pack("<IQ", 4, 2**61))]),
            "a list of 2305843009213693952 numbers",
        ),
        (
            header(entries=[entry(b"a", 9, struct.pack("<IQ", 8, 2**61))]),
            "a list of 2305843009213693952 texts",
        ),
        (header(entries=[entry(b"a", 9, struct.pack("<IQ", 8, 2**20))]), "cut off"),
        (header(entries=[entry(b"a", 9, NESTED)]), "metadata of the kind 9"),
        (header(entries=[entry(b"a", 77, b"")]), "metadata of the kind 77"),
        (header(entries=[entry(b"a", 0, b"1")] * 2), "the entry 'a' twice"),
        (padded(header(entries=[entry(b"general.alignment", 4, struct.pack("<I", 0))])), "alignment is 0"),
        (padded(header(entries=[entry(b"general.alignment", 4, struct.pack("<I", 48))])), "alignment is 48"),
        (padded(header(entries=[entry(b"general.alignment", 8, text(b"x"))])), "alignment is 'x'"),
        (padded(header(infos=ONE * 2)), "the tensor 'a' twice"),
        (padded(header(infos=[(b"a", (4,) * 9, 0, 0)])), "has 9 axes"),
        (padded(header(infos=[(b"a", (2**40, 2**40), 0, 0)])), "cannot have the shape"),
        (padded(header(infos=[(b"a", (2**63, 2), 0, 0)])), "cannot have the shape"),
        (padded(header(infos=[(b"a", (0, 4), 0, 0)])), "cannot have the shape"),
        (padded(header(infos=[(b"a", (33, 4), 8, 0)])), "of the type Q8_0 cannot have the shape"),
        (padded(header(infos=[(b"a", (4, 4), 0, 224)])), "lies outside of the file"),
        (padded(header(infos=[(b"a", (4, 4), 0, 2**63)])), "lies outside of the file"),
        (padded(header(infos=[*ONE, (b"b", (4, 4), 0, 32)])), "the tensors 'a' and 'b' lie on each other"),
        (
            padded(header(infos=[(b"a", (4, 4), 31, 0)])),
            "of the type number 31, which the gguf pack",
        ),
        (
            padded(header(infos=[(b"a", (4, 4), 999, 0)])),
            "of the type number 999, which the gguf pack",
        ),
        (
            padded(header(infos=[(b"a", (256, 4), 15, 0)])),
            "of the type Q8_K, which the gguf pack",
        ),
        (
            padded(
                header(
                    entries=[entry(ORIGINAL, 9, struct.pack("<IQ3i", 5, 3, 4, 4, 4))],
                    infos=ONE,
                )
            ),
            "and told to have been",
        ),
        (
            padded(
                header(
                    entries=[entry(ORIGINAL, 9, struct.pack("<IQ3i", 5, 3, -4, -4, 1))],
                    infos=ONE,
                )
            ),
            "and told to have been",
        ),
        (
            padded(header(entries=[entry(ORIGINAL, 8, text(b"xy"))], infos=ONE)),
            "is no list of whole numbers",
        ),
        (
            padded(header(entries=[entry(ORIGINAL, 4, struct.pack("<I", 16))], infos=ONE)),
            "is no list of whole numbers",
        ),
    ],
)
def test_headers_that_cannot_be(data, message, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=message) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_file_that_is_cut_off_anywhere_and_one_with_other_bytes(tmp_path):
    tensors = {"a": (np.ones((4, 32), np.float32), KINDS.Q8_0), "b": (np.ones(8, np.float32), KINDS.F32)}
    shape = {"comfy__gguf__orig_shape__a": [4, 2, 4, 4]}
    whole = write(tmp_path / "a.gguf", tensors, **shape).read_bytes()
    found, _ = read_gguf(tmp_path / "a.gguf")
    assert found["a"].shape == (4, 2, 4, 4)
    path = tmp_path / "b.gguf"
    for length in range(0, len(whole) - 32, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            read_gguf(path)
    g = np.random.default_rng(0)
    for _ in range(400):
        data = bytearray(whole)
        for place in g.integers(0, len(whole), 3):
            data[place] = g.integers(256)
        path.write_bytes(data)
        try:
            for tensor in read_gguf(path)[0].values():
                tensor.load()
        except ConceptMasterError as error:
            assert len(str(error)) < 1000
    path.write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "c.gguf")
