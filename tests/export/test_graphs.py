"""Every graph against the module that it came from, for every variant, and what the files hold."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

ENCODERS = ("qformer", "mlp")
BINDINGS = ("dam", "none", "concat_mlp", "self_attention")
INJECTIONS = ("standalone", "shared_query", "merged")
GRAPHS = (
    "text_encoder",
    "image_encoder",
    "qformer",
    "dam",
    "condition",
    "denoise",
    "decode_first",
    "decode",
)


def load(path):
    onnx = pytest.importorskip("onnx")
    return onnx.load(str(path))


def operators(path):
    return [node.op_type for node in load(path).graph.node]


@pytest.mark.parametrize("graph", GRAPHS)
def test_graph_equals_module(bundle, specs, run, assert_close, graph):
    spec = specs[graph]
    for seed in (3, 4):
        sample = spec.sample(seed)
        expected, found = spec.run(sample), run(bundle / f"{graph}.onnx", sample)
        assert list(found) == list(expected) == [tensor.name for tensor in spec.outputs]
        for name in found:
            assert_close(found[name], expected[name])


# What a variant changes, and the graphs that it changes.
VARIANTS = [
    ({"encoder": "mlp"}, 2, ("qformer",)),
    ({"encoder": "joined_mlp"}, 2, ("qformer",)),
    ({"binding": "none"}, 2, ("dam",)),
    ({"binding": "concat_mlp"}, 2, ("dam",)),
    ({"binding": "self_attention"}, 2, ("dam",)),
    ({"binding": "self_attention_ffn"}, 2, ("dam",)),
    ({"injection": "shared_query"}, 3, ("condition", "denoise")),
    ({"injection": "merged"}, 1, ("condition", "denoise")),
    ({"encoder": "mlp", "binding": "self_attention", "injection": "merged"}, 2, ("dam", "condition")),
]


def check_variant(source, branches, graphs, folder, run, assert_close):
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.onnx_graphs.trace import export_graph

    found = {}
    for spec in graph_specs(source.model, source.vae, branches=branches):
        if spec.name in graphs:
            path = folder / f"{spec.name}.onnx"
            found[spec.name] = export_graph(spec, path)
            sample = spec.sample(3)
            expected = spec.run(sample)
            for name, output in run(path, sample).items():
                assert_close(output, expected[name])
    return found


@pytest.mark.parametrize(
    ("changes", "branches", "graphs"), VARIANTS, ids=[" ".join(v[0].values()) for v in VARIANTS]
)
def test_variant_equals_module(source_for, tmp_path, run, assert_close, changes, branches, graphs):
    source = source_for(**changes)
    found = check_variant(source, branches, graphs, tmp_path, run, assert_close)
    if changes.get("binding") == "none":
        assert [tensor.name for tensor in found["dam"].inputs] == ["visual_queries"]
    if changes.get("injection") == "merged":
        assert [tensor.name for tensor in found["condition"].outputs] == ["text_keys", "text_values"]
    if "denoise" in found:
        assert found["denoise"].input("concept_mask").shape[0] == branches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "binding", "injection"), list(itertools.product(ENCODERS, BINDINGS, INJECTIONS))
)
def test_every_variant_makes_a_bundle(
    source_for, tiny, bundle, taken_from, tmp_path, encoder, binding, injection
):
    from conceptmaster import Concept, Pipeline
    from conceptmaster.export.bundle import write_bundle

    source = source_for(encoder=encoder, binding=binding, injection=injection)
    # What no variant changes is taken over, to save the time of exporting it.
    source.model.text_encoder = tiny.model.text_encoder
    source.model.image_encoder = tiny.model.image_encoder
    with taken_from(bundle, "text_encoder", "image_encoder", "decode_first", "decode"):
        write_bundle(dataclasses.replace(source, vae=tiny.vae), tmp_path / "bundle")

    pipeline = Pipeline.from_bundle(tmp_path / "bundle", threads=1)
    concept = Concept("b", np.full((8, 8, 3), 200, np.uint8))
    with_it, without = (pipeline("a", concepts, steps=2).frames for concepts in ([concept], []))
    assert with_it.shape == (5, 32, 32, 3) and (with_it != without).any()


def test_samples_have_padded_and_filled_places(specs):
    masks = [specs["condition"].sample(seed)["concept_mask"] for seed in range(20)]
    assert all(mask[-1].any() and not mask.all() and not mask[:-1].any() for mask in masks)
    assert len({int(mask.sum()) for mask in masks}) > 1
    lengths = [int(specs["text_encoder"].sample(seed)["token_mask"].sum()) for seed in range(20)]
    assert min(lengths) >= 1 and len(set(lengths)) > 5
    one, again, other = (specs["denoise"].sample(seed) for seed in (5, 5, 6))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["state"], other["state"])


def test_the_padded_places_hold_nothing_that_matters(bundle, specs, run, int8):
    """Bit for bit, also in int8, whatever finite numbers are there."""
    sample = specs["condition"].sample(3)
    seen = sample["concept_mask"].any(0)
    other = dict(sample, concept_tokens=sample["concept_tokens"].clone())
    other["concept_tokens"][~seen] = 1e4
    before, after = (run(bundle / "condition.onnx", s) for s in (sample, other))
    assert all((before[name] == after[name]).all() for name in before)

    sample = specs["denoise"].sample(3)
    seeing, tokens = sample["concept_keys"].shape[1:3]
    hidden = ~sample["concept_mask"][-seeing:].repeat_interleave(tokens // len(seen), 1)  # [R,C]
    assert hidden.any(1).all()
    other = dict(sample)
    for name in ("concept_keys", "concept_values"):
        other[name] = torch.where(hidden[None, :, :, None, None], torch.tensor(1e4), sample[name])
    for path in (bundle / "denoise.onnx", int8):
        before, after = (run(path, s)["next_state"] for s in (sample, other))
        assert (before == after).all()


def test_a_concept_that_is_there_does_matter(bundle, specs, run):
    sample = specs["denoise"].sample(3)
    other = dict(sample, concept_values=sample["concept_values"] + 1)
    before, after = (run(bundle / "denoise.onnx", s)["next_state"] for s in (sample, other))
    assert abs(before[-1] - after[-1]).max() > 1e-3


def test_the_step_is_guidance_and_the_solver_around_the_velocity(tiny, specs, bundle, run, assert_close):
    sample = specs["denoise"].sample(3)
    kv = {name: value for name, value in sample.items() if name.endswith(("_keys", "_values"))}
    with torch.inference_mode():
        velocity = 0
        for k, weight in enumerate(sample["guidance"]):
            # one that sees no concepts has no keys of them: the mask lets it look at nobody else's
            own = {name: value[:, min(k, value.shape[1] - 1)][:, None] for name, value in kv.items()}
            mask = sample["concept_mask"][k : k + 1]
            velocity = velocity + weight * tiny.model.transformer.denoise(
                sample["state"][:1], sample["time"], own, mask
            )
    parts = torch.cat((sample["state"], velocity))
    expected = torch.einsum("mj,j...->m...", sample["coefficients"], parts)
    assert_close(run(bundle / "denoise.onnx", sample)["next_state"], expected)


@pytest.mark.parametrize("graph", GRAPHS)
def test_files_hold_the_computation_and_nothing_else(bundle, graph):
    model = load(bundle / f"{graph}.onnx")
    assert not model.metadata_props and not model.doc_string
    assert [f.name for f in model.functions] == (["ConceptInjection"] if graph == "denoise" else [])
    assert not model.graph.metadata_props and not model.graph.doc_string and not model.graph.value_info
    for node in model.graph.node:
        assert not node.metadata_props and not node.doc_string and "/" not in node.name
        assert node.domain in ("", "conceptmaster") and node.op_type != "ScatterND"
    data = (bundle / f"{graph}.onnx").read_bytes()
    assert not any(word in data for word in (b"site-packages", b"Traceback", str(Path.cwd()).encode()))


def test_attention_and_rotation_are_single_nodes(bundle, tiny):
    config = tiny.model.config.transformer
    found = operators(bundle / "denoise.onnx")
    assert found.count("RotaryEmbedding") == 2 * config.num_layers  # queries and keys
    assert found.count("Attention") == 2 * config.num_layers  # of the video, to the text
    assert found.count("ConceptInjection") == config.num_layers
    assert found.count("Transpose") <= 2  # patches and back; none around attention
    model = load(bundle / "denoise.onnx")
    assert all(
        {"q_num_heads", "kv_num_heads"} <= {a.name for a in node.attribute}
        for node in model.graph.node
        if node.op_type == "Attention"
    )


def test_the_same_weights_give_the_same_bytes(bundle, specs, tmp_path):
    from conceptmaster.export.onnx_graphs.trace import export_graph

    export_graph(specs["dam"], tmp_path / "dam.onnx")
    assert (tmp_path / "dam.onnx").read_bytes() == (bundle / "dam.onnx").read_bytes()


def test_many_weights_go_beside_the_file(monkeypatch, specs, tmp_path, run, assert_close):
    from conceptmaster.export.onnx_graphs import trace
    from conceptmaster.export.onnx_graphs.int8 import quantise
    from conceptmaster.hashed import sha256_file

    monkeypatch.setattr(trace, "EXTERNAL_BYTES", 100)
    path, beside = tmp_path / "qformer.onnx", tmp_path / "qformer.onnx.data"
    spec = specs["qformer"]
    found = trace.export_graph(spec, path)
    assert [(file.file, file.sha256) for file in found.external] == [(beside.name, sha256_file(beside))]
    sample = spec.sample(3)
    expected = spec.run(sample)["visual_queries"]
    assert_close(run(path, sample)["visual_queries"], expected)

    size = beside.stat().st_size
    quantise(path)
    assert beside.stat().st_size < size / 2 and sorted(tmp_path.iterdir()) == [path, beside]
    again = tmp_path / "again"
    again.mkdir()
    path.rename(again / path.name), beside.rename(again / beside.name)
    assert abs(run(again / path.name, sample)["visual_queries"] - expected.numpy()).max() < 0.1


def test_int8_is_close_and_leaves_attention_alone(bundle, specs, int8, run):
    from conceptmaster.export.verify import TOLERANCES, check

    row = check(specs["denoise"], int8, "int8")
    assert row.ok and 1e-4 < row.relative <= TOLERANCES["int8"]
    sample = specs["denoise"].sample(3)
    expected, found = specs["denoise"].run(sample)["next_state"].numpy(), run(int8, sample)["next_state"]
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)
    before, after = operators(bundle / "denoise.onnx"), operators(int8)
    assert after.count("Attention") == before.count("Attention")
    assert after.count("MatMulInteger") > 0.5 * before.count("MatMul")
    model = load(int8)
    constants = {value.name: value for value in model.graph.initializer}
    weights = [node.input[1] for node in model.graph.node if node.op_type == "MatMulInteger"]
    assert all(name in constants for name in weights)
    assert not model.metadata_props and not model.graph.value_info
    assert sorted(int8.parent.iterdir()) == [int8]
    # 7 bits: two products of a weight and an activation (below 256) fit in 16 bits, see `quantise`.
    numpy_helper = pytest.importorskip("onnx").numpy_helper
    assert max(abs(numpy_helper.to_array(constants[name]).astype(int)).max() for name in weights) <= 64
