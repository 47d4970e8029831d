"""Bases whose weights stay on disk: the same bundle, in the memory of the largest layer."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from conceptmaster.errors import ExportError  # noqa: E402

ALIGNMENT = 4096
SIZE = ("--size", "64x64", "--frames", "9", "--quiet")


@pytest.fixture
def streamed(monkeypatch):
    """Tiny weights stay on disk, too."""

    from conceptmaster.engine.checkpoints import lazy_weights
    from conceptmaster.export.onnx_graphs import weights_16bit

    monkeypatch.setattr(lazy_weights, "MIN_ELEMENTS", 64)
    monkeypatch.setattr(weights_16bit, "SMALLEST", 64)


def test_a_base_on_disk_gives_what_one_in_memory_does(wan_folder, tmp_path, streamed, monkeypatch, run):
    """Every graph, at its own size, against the modules with all weights in memory."""
    from conceptmaster.cli import main
    from conceptmaster.engine.checkpoints.lazy_weights import stored_weights
    from conceptmaster.engine.checkpoints.source import Choices, open_source
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.verify import TOLERANCES, relative_error
    from conceptmaster.runtime.bundle_format.manifest import load

    assert main(["export", str(wan_folder), "--output", str(tmp_path / "disk"), *SIZE]) == 0
    monkeypatch.undo()
    assert all(graph.external for graph in load(tmp_path / "disk").graphs.values())
    source = open_source(wan_folder, Choices((64, 64), 9))
    assert not stored_weights(source.model)
    for spec in graph_specs(source.model, source.vae):
        assert not spec.external
        sample = spec.sample(2)
        found, expected = run(tmp_path / "disk" / f"{spec.name}.onnx", sample), spec.run(sample)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert relative_error(found[name], value.numpy()) <= TOLERANCES["fp32"], (spec.name, name)


def test_what_lies_beside_a_graph(tmp_path, streamed, wan_folder):
    """Aligned, in 16 bits where these hold the values, the table of words cast behind its Gather."""
    import onnx

    from conceptmaster.engine.checkpoints.source import Choices, open_source
    from conceptmaster.engine.checkpoints.weight_files import stored_tensors
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.onnx_graphs.trace import export_graph
    from conceptmaster.hashed import sha256_file

    folder = shutil.copytree(wan_folder, tmp_path / "base")
    part = folder / "text_encoder"
    tensors = {name: stored.read() for name, stored in stored_tensors(part).items()}
    halves = {name: value.to(torch.bfloat16) for name, value in tensors.items() if value.ndim > 1}
    kept = next(name for name in halves if name.endswith("wo.weight"))
    halves[kept] = tensors[kept]
    save_file(tensors | halves, part / "model.safetensors")
    source = open_source(folder, Choices((64, 64), 9))
    spec = next(iter(graph_specs(source.model, source.vae)))
    graph = export_graph(spec, tmp_path / "text_encoder.onnx")
    assert graph.external[0].sha256 == sha256_file(tmp_path / graph.external[0].file)
    model = onnx.load(tmp_path / graph.file, load_external_data=False)
    types = {}
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert int(entries["offset"]) % ALIGNMENT == 0
            types[tensor.name.removesuffix(".stored")] = tensor.data_type
    float32 = {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT}
    assert float32 == {f"model.{kept}"} and len(types) > 10
    producers = {name: node for node in model.graph.node for name in node.output}
    names = ("shared.weight.stored", "embed_tokens.weight.stored")  # one table, tied
    tables = [n for n in model.graph.node if n.op_type == "Gather" and n.input[0].endswith(names)]
    assert len(tables) == 1
    assert any(n.op_type == "Cast" and n.input[0] == tables[0].output[0] for n in producers.values())


def test_what_a_graph_on_disk_is_held_to(tmp_path, streamed, wan_folder):
    """Another weight, a weight that is not there, other operators: each is found."""
    import onnx

    from conceptmaster.engine.checkpoints.source import Choices, open_source
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.onnx_graphs.trace import export_graph
    from conceptmaster.export.verify import check_small, checked_specs

    source = open_source(wan_folder, Choices((64, 64), 9))
    spec = {spec.name: spec for spec in graph_specs(source.model, source.vae)}["dam"]
    small = {spec.name: spec for spec in checked_specs(source, branches=2)}["dam"]
    path = tmp_path / "dam.onnx"
    export_graph(spec, path)
    row = check_small(small, path)
    assert row.ok and row.small and 0 < row.relative < 2e-5

    data = path.with_name("dam.onnx.data")
    whole = data.read_bytes()
    data.write_bytes(whole[:8192] + bytes(512) + whole[8192 + 512 :])
    assert not check_small(small, path).ok
    data.write_bytes(whole)
    model = onnx.load(path, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Add").op_type = "Sub"
    onnx.save(model, path)
    with pytest.raises(ExportError, match="computes something else"):
        check_small(small, path)
    data.unlink()
    with pytest.raises(ExportError, match="cannot load"):
        check_small(small, path)


def test_large_videos_get_the_same_operators_and_longer_ones_the_same_decoder(streamed, wan_folder):
    """None of the rewrites stops at a size, and the decoder does not grow with the number of frames."""
    from conceptmaster.engine.checkpoints.source import Choices, open_source
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.onnx_graphs.trace import trace
    from conceptmaster.export.onnx_graphs.weights_16bit import weight_readers
    from conceptmaster.export.verify import _computes, checked_specs

    source = open_source(wan_folder, Choices((832, 480), 81))  # only shapes: nothing of this size is computed
    large = {spec.name: spec for spec in graph_specs(source.model, source.vae)}
    small = {spec.name: spec for spec in checked_specs(source, branches=2)}
    weights = weight_readers(large["denoise"].module)
    operators = [_computes(trace(specs["denoise"], weights)[0], weights) for specs in (large, small)]
    assert operators[0] == operators[1]
    kinds = ("Attention", "ConceptInjection", "RotaryEmbedding")  # of two blocks
    assert [operators[0].count(kind) for kind in kinds] == [4, 2, 4]

    longer = dataclasses.replace(source.model.config, frames=161, height=64, width=64)
    short = dataclasses.replace(longer, frames=5)
    for name in ("decode_first", "decode"):  # a graph is traced from these alone
        one, other = (
            {s.name: s for s in graph_specs(source.model, source.vae, config=config)}[name]
            for config in (longer, short)
        )
        assert (one.inputs, one.outputs) == (other.inputs, other.outputs)
        assert repr(one.module) == repr(other.module)


@pytest.mark.slow
def test_references_on_disk(image_to_video_parts, tmp_path, streamed, capsys):
    """SkyReels-A2's three need a longer small video, and have two graphs that encode them."""
    import json

    from conceptmaster.cli import main
    from conceptmaster.runtime.bundle_format.manifest import load

    folder = tmp_path / "a2"
    for name, part in image_to_video_parts().items():
        part.save_pretrained(folder / name)
    capsys.readouterr()  # what writing the folder said
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "A2Model"}))
    size = ("--size", "128x96", "--frames", "21", "--quiet")
    assert main(["export", str(folder), "--output", str(tmp_path / "new"), *size]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count(" ok (small video)\n") == 8
    assert all(graph.external for graph in load(tmp_path / "new").graphs.values())
    assert main(["verify", str(tmp_path / "new"), "--source", str(folder), "--quiet"]) == 0


def test_int8_is_for_models_in_memory(tmp_path, streamed, wan_folder, capsys):
    from conceptmaster.cli import main

    assert main(["export", str(wan_folder), "--output", str(tmp_path / "new"), "--int8", *SIZE]) == 2
    assert "int8 is for models whose weights fit the memory" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_stays_far_below_the_weights(tmp_path):
    """A base of 0.9 GB in float32 on disk: the memory that no file stands behind grows by far less."""
    from conceptmaster.benchmarks.random_base import write_base
    from conceptmaster.engine.presets import preset

    from ...full_size.export_cost import measure

    config = preset("wan2.1-1.3b")
    replace = dataclasses.replace
    transformer = replace(
        config.transformer, num_attention_heads=8, num_layers=16, ffn_dim=4096, text_dim=512
    )
    text = config.text_encoder | {
        "d_model": 512,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 8,
        "vocab_size": 4096,
    }
    vae = config.vae | {"base_dim": 16}
    none = replace(config.concept, injection="none")
    config = replace(config, transformer=transformer, text_encoder=text, vae=vae, concept=none)
    write_base(config, tmp_path / "large")
    few = replace(config, transformer=replace(transformer, num_layers=1))
    write_base(few, tmp_path / "small")
    size = ["--size", "128x128", "--frames", "9"]
    peaks = []
    for name in ("small", "large"):
        found = measure([str(tmp_path / name), "--output", str(tmp_path / f"{name}.bundle"), *size])
        peaks.append(found["peak_gib"]["anonymous"])
    weights = (
        sum(p.stat().st_size for p in (tmp_path / "large" / "transformer").glob("*.safetensors")) / 2**30
    )
    assert weights > 0.8 and peaks[1] - peaks[0] < weights / 4, (peaks, weights)
