"""Every graph through NVIDIA's own parser and builder: TensorRT for RTX does both without a GPU. Nothing
runs.

Quick here: every graph of the shipped bundle in each precision, and the tiny preset with the node. Slow:
every precision for every target, two blocks of Wan2.1 1.3B's width, and its denoise graph in full depth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("onnxscript")
trt = pytest.importorskip(
    "tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[tensorrt-rtx]'"
)

import onnx  # noqa: E402
from onnxscript import ir  # noqa: E402

from conceptmaster.cli import main  # noqa: E402
from conceptmaster.errors import ExportError  # noqa: E402
from conceptmaster.export.onnx_graphs.concept_node import (  # noqa: E402
    BIASED,
    BOXED,
    DECOUPLED,
    DOMAIN,
    function_text,
)
from conceptmaster.export.tensorrt_engines import builder  # noqa: E402
from conceptmaster.export.tensorrt_engines.builder import Limits  # noqa: E402
from conceptmaster.export.tensorrt_engines.builder_process import BuilderProcess  # noqa: E402
from conceptmaster.export.tensorrt_engines.fp8 import linears  # noqa: E402
from conceptmaster.export.tensorrt_engines.precision import prepare  # noqa: E402
from conceptmaster.hashed import sha256_file  # noqa: E402
from conceptmaster.runtime.bundle_format import tensorrt_engines as stored  # noqa: E402
from conceptmaster.runtime.bundle_format.find import SHIPPED, Bundle  # noqa: E402
from conceptmaster.runtime.bundle_format.hashed_file import HashedFile  # noqa: E402
from conceptmaster.runtime.bundle_format.manifest import load, save  # noqa: E402
from conceptmaster.runtime.bundle_format.tensorrt_engines import PRECISIONS  # noqa: E402

SPRITES = SHIPPED / "sprites"
GRAPHS = sorted(path.stem for path in SPRITES.glob("*.onnx"))
TARGETS = (80, 89, 120)
FULL_DEPTH = 16, 12  # GiB of memory, of disk
TI2V, EXPERT, VACE = 12, 9, 16  # GiB of memory; the last has a third block
EVERYTHING = [
    (g, p, t) for g in GRAPHS for p in PRECISIONS for t in TARGETS if (p, t) != ("fp8", 80)
]  # which has no 8-bit floating point
QUICK = [(g, p, TARGETS[i % 3]) for g in GRAPHS for i, p in enumerate(PRECISIONS[:3])]
QUICK.append(("denoise", "fp8", 89))

from conceptmaster.engine.presets import VIT_H, from_pictures, preset  # noqa: E402


def build(source, tmp_path, precision, capability):
    target = tmp_path / "graph.onnx"
    prepare(source, target, precision, ranges(source) if precision == "fp8" else None)
    built = builder.build(trt, target, capability, Limits(level=0))
    assert len(built.engine) > 1000 and built.layers > 0
    return built


def ranges(source):
    """Anything, for the denoise graph's matrices: engines of other scales are built alike."""
    return {node.name: 8.0 for node in linears(ir.load(source))} if source.stem == "denoise" else {}


def attention(built):
    return len(built.whole_attention), len(built.decomposed_attention)


def check(graph, precision, capability, tmp_path):
    source = SPRITES / f"{graph}.onnx"
    built = build(source, tmp_path, precision, capability)
    found = sum(node.op_type == "Attention" or node.domain == DOMAIN for node in ir.load(source).graph)
    assert found == (18 if graph == "denoise" else found)
    assert attention(built) == ((0, found) if precision == "fp32" else (found, 0))


@pytest.mark.parametrize(("graph", "precision", "capability"), QUICK)
def test_a_graph_builds(graph, precision, capability, tmp_path):
    check(graph, precision, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("graph", "precision", "capability"), [e for e in EVERYTHING if e not in QUICK])
def test_every_graph_builds(graph, precision, capability, tmp_path):
    check(graph, precision, capability, tmp_path)


def test_weights_beside_the_graph_reach_the_engine(tmp_path):
    path = tmp_path / "bundle" / "dam.onnx"
    path.parent.mkdir()
    ir.save(ir.load(SPRITES / path.name), path, external_data="dam.onnx.data")
    outside, inside = (build(p, tmp_path, "bf16", 89) for p in (path, SPRITES / path.name))
    assert outside.layers == inside.layers and abs(len(outside.engine) - len(inside.engine)) < 4096


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_node_builds(bundle, precision, tmp_path):
    """On heads 12 wide, for which the library has no kernel in 16 bits."""
    assert attention(build(bundle / "denoise.onnx", tmp_path, precision, 89)) == (0, 6)


@pytest.mark.parametrize("injection", ["standalone", "shared_query"])
def test_a_bias_of_the_text_builds(source_for, tmp_path, injection):
    """What `export --text-tokens` writes, in fp32, fp16 and bf16."""
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.onnx_graphs.trace import export_graph

    source = source_for(injection=injection)
    specs = graph_specs(source.model, source.vae, whole_text=512)
    export_graph(next(s for s in specs if s.name == "denoise"), tmp_path / "denoise.onnx")
    for precision in PRECISIONS[:3]:
        built = build_apart(tmp_path / "denoise.onnx", tmp_path, precision)
        assert (built.whole_attention, built.decomposed_attention) == (0, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("injection", "whole_text"), [("standalone", None), ("shared_query", None), ("shared_query", 512)]
)
def test_boxes_build(source_for, tmp_path, injection, whole_text):
    """What `export --boxes` writes, in fp32, fp16 and bf16."""
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.onnx_graphs.trace import export_graph

    source = source_for(injection=injection, mask="boxes")
    specs = graph_specs(source.model, source.vae, whole_text=whole_text)
    export_graph(next(s for s in specs if s.name == "denoise"), tmp_path / "denoise.onnx")
    for precision in PRECISIONS[:3]:
        built = build_apart(tmp_path / "denoise.onnx", tmp_path, precision)
        assert (built.whole_attention, built.decomposed_attention) == (0, 6)


@pytest.mark.parametrize(
    "node",
    [DECOUPLED, BIASED, *(pytest.param(BOXED + n, marks=pytest.mark.slow) for n in (DECOUPLED, BIASED))],
)
@pytest.mark.parametrize("precision", PRECISIONS[:3])
def test_two_attentions_of_the_same_queries_build(precision, node, tmp_path):
    """What the builder dies of: in a process of its own, where that would be an error."""
    names = {name: 32 if name == "q" else 5 for name in ("q", "text_k", "text_v", "k", "v")}
    sizes = ", ".join(f"float[2,{tokens},256] {name}" for name, tokens in names.items())
    more = {}
    if node.endswith(BIASED):
        more["text_bias"] = "float[2,5]"
    if node.startswith(BOXED):
        more["boxes"] = "bool[1,32,5]"
    kinds, given = "".join(f", {kind} {name}" for name, kind in more.items()), "".join(f", {n}" for n in more)
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 23, "{DOMAIN}": 1]> g ({sizes}, bool[2,5] mask{kinds}) => '
        f"(float[2,32,256] out) "
        f"{{ out = {DOMAIN}.{node}<heads: int = 2>({', '.join(names)}, mask{given}) }}"
    )
    proto.functions.append(onnx.parser.parse_function(function_text(node, 23)))
    onnx.save(proto, tmp_path / "node.onnx")
    built = build_apart(tmp_path / "node.onnx", tmp_path, precision)
    assert (built.whole_attention, built.decomposed_attention) == ((0, 2) if precision == "fp32" else (2, 0))


def build_apart(source, tmp_path, precision):
    target = tmp_path / "graph.onnx"
    prepare(source, target, precision)
    with BuilderProcess("rtx", with_plugin=False) as process:
        return process.build(target, tmp_path / "graph.engine", precision, 89, Limits(level=0), None)


VIT = VIT_H | {"num_hidden_layers": 1, "intermediate_size": 16}


def wan(blocks, size=None, image_to_video=None, name="wan2.1-1.3b"):
    """The graphs' specs of Wan2.1 1.3B's width, or of another, with so few blocks; random weights, small
    encoders. image_to_video: how many pictures, and how they are given."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from conceptmaster.engine.checkpoints.source import random_source
    from conceptmaster.export.graphs import graph_specs

    config, tiny = preset(name), preset("tiny")
    own = {} if config.concept.side is None else {"side": 96}
    depth = {"num_layers": blocks, **({"vace_layers": (0,)} if config.transformer.vace_layers else {})}
    config = dataclasses.replace(
        config,
        transformer=dataclasses.replace(config.transformer, text_dim=16, **depth),
        concept=dataclasses.replace(config.concept, picture_size=16, picture_tokens=4, picture_dim=16, **own),
        text_encoder=tiny.text_encoder,
        image_encoder=tiny.image_encoder,
        boundary=None,  # of two experts the first: the other is the same
        **(size or {"frames": 17 if image_to_video else 5, "height": 64, "width": 64}),
    )
    if image_to_video:
        config = dataclasses.replace(from_pictures(config, *image_to_video), image_encoder=VIT)
    source = random_source(config)
    # In full size denoise alone is exported, and nothing is run for its shapes; a decoder's own tensors would
    # be fake, too.
    with FakeTensorMode(allow_non_fake_inputs=True) if size else contextlib.nullcontext():
        return {spec.name: spec for spec in graph_specs(source.model, source.vae)}


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    from conceptmaster.export.onnx_graphs.trace import export_graph

    folder = tmp_path_factory.mktemp("wan")
    for spec in wan(2).values():
        export_graph(spec, folder / f"{spec.name}.onnx")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_blocks_of_wan_build(two_blocks, tmp_path, precision, capability):
    if (precision, capability) == ("fp8", 80):
        pytest.skip("sm_80 has no 8-bit floating point")
    for path in sorted(two_blocks.glob("*.onnx")):
        built = build(path, tmp_path, precision, capability)
        if path.stem == "denoise":
            assert attention(built) == ((0, 6) if precision == "fp32" else (6, 0))


@pytest.mark.slow
def test_an_image_to_video_model_builds(tmp_path):
    """`denoise` with a base's own attention to its pictures, at Wan's width."""
    from conceptmaster.export.onnx_graphs.trace import export_graph

    specs = wan(2, image_to_video=(3, "references"))
    export_graph(specs["denoise"], tmp_path / "denoise.onnx")
    for precision in PRECISIONS[:3]:
        built = build_apart(tmp_path / "denoise.onnx", tmp_path, precision)
        whole, apart = built.whole_attention, built.decomposed_attention
        assert (whole, apart) == ((0, 6) if precision == "fp32" else (6, 0))


@pytest.mark.slow
def test_magref_builds(tmp_path):
    """Two blocks at their real width, with the tokens of one canvas."""
    from conceptmaster.export.onnx_graphs.trace import export_graph

    if available() < EXPERT << 30:
        pytest.skip(f"needs {EXPERT} GiB of memory")
    specs = wan(2, image_to_video=(1, "canvas"), name="wan2.1-14b")
    for name in ("condition", "denoise"):
        export_graph(dataclasses.replace(specs.pop(name), external=True), tmp_path / f"{name}.onnx")
    specs.clear()  # gigabytes
    for name, attentions in (("condition", 0), ("denoise", 6)):
        for precision in PRECISIONS[:3]:
            built = build_apart(tmp_path / f"{name}.onnx", tmp_path, precision)
            whole = attentions if precision != "fp32" else 0
            assert (built.whole_attention, built.decomposed_attention) == (whole, attentions - whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bernini-r-1.3b", "bernini-r-14b"])
def test_pictures_of_their_own_size_build(tmp_path, name):
    """Two blocks at their real width with four pictures, guided by projection, and the encoder of these."""
    from conceptmaster.export.onnx_graphs.trace import export_graph

    if available() < EXPERT << 30 and "14b" in name:
        pytest.skip(f"needs {EXPERT} GiB of memory")
    specs = wan(2, name=name)
    graphs = {"condition": 0, "denoise": 6, **({"encode_first": 1} if name == "bernini-r-1.3b" else {})}
    for graph in graphs:
        export_graph(specs.pop(graph), tmp_path / f"{graph}.onnx")
    specs.clear()  # gigabytes
    for graph, attentions in graphs.items():
        for precision in PRECISIONS[:3]:
            built = build_apart(tmp_path / f"{graph}.onnx", tmp_path, precision)
            whole = attentions if precision != "fp32" and graph == "denoise" else 0
            assert (built.whole_attention, built.decomposed_attention) == (whole, attentions - whole)


@pytest.mark.slow
def test_a_base_of_text_or_a_picture_builds(tmp_path):
    """Wan2.2's TI2V-5B: two blocks with a time for each latent frame, and its VAE, at their real widths."""
    from conceptmaster.export.onnx_graphs.trace import export_graph

    if available() < TI2V << 30:
        pytest.skip(f"needs {TI2V} GiB of memory")
    specs = wan(2, name="wan2.2-ti2v-5b")
    for name in ("denoise", "encode_first", "decode_first", "decode"):
        path = tmp_path / f"{name}.onnx"
        export_graph(specs.pop(name), path)
        attentions = 4 if name == "denoise" else 1
        for precision in PRECISIONS[:3]:
            built = build_apart(path, tmp_path, precision)
            whole = attentions if (name, precision != "fp32") == ("denoise", True) else 0
            assert (built.whole_attention, built.decomposed_attention) == (whole, attentions - whole)


@pytest.mark.slow
def test_an_expert_of_image_to_video_builds(tmp_path):
    """Wan2.2's I2V-A14B, whose pictures are frames alone: two blocks of an expert at their real width. A
    text-to-video one has Wan2.1's graphs, and the other expert the same as the first."""
    from conceptmaster.export.onnx_graphs.trace import export_graph

    if available() < EXPERT << 30:
        pytest.skip(f"needs {EXPERT} GiB of memory")
    specs = wan(2, name="wan2.2-i2v-a14b")
    for name in ("condition", "denoise"):
        export_graph(specs.pop(name), tmp_path / f"{name}.onnx")
    specs.clear()  # gigabytes
    for name in ("condition", "denoise"):
        attentions = 4 if name == "denoise" else 0
        for precision in PRECISIONS[:3]:
            built = build_apart(tmp_path / f"{name}.onnx", tmp_path, precision)
            whole = attentions if precision != "fp32" else 0
            assert (built.whole_attention, built.decomposed_attention) == (whole, attentions - whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan2.1-vace-1.3b", "wan2.1-vace-14b"])
def test_vace_builds(tmp_path, name):
    """Two blocks and one of its own beside them, at their real width."""
    from conceptmaster.export.onnx_graphs.trace import export_graph

    if available() < VACE << 30 and "14b" in name:
        pytest.skip(f"needs {VACE} GiB of memory")
    specs = wan(2, name=name)
    for graph in ("condition", "denoise"):
        export_graph(specs.pop(graph), tmp_path / f"{graph}.onnx")
    specs.clear()  # gigabytes
    for graph, attentions in (("condition", 0), ("denoise", 6)):
        for precision in PRECISIONS[:3]:
            built = build_apart(tmp_path / f"{graph}.onnx", tmp_path, precision)
            whole = attentions if precision != "fp32" else 0
            assert (built.whole_attention, built.decomposed_attention) == (whole, attentions - whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phantom-wan-1.3b", "skyreels-v3-r2v-14b"])
def test_references_behind_the_video_build(tmp_path, name):
    """Two blocks at their real width: Phantom's 1.3B with one reference, SkyReels-V3's with four. Phantom's
    14B has the latter's graphs with fewer of them."""
    from conceptmaster.export.onnx_graphs.trace import export_graph

    if available() < EXPERT << 30 and "14b" in name:
        pytest.skip(f"needs {EXPERT} GiB of memory")
    specs = wan(2, name=name)
    for graph in ("condition", "denoise"):
        export_graph(specs.pop(graph), tmp_path / f"{graph}.onnx")
    specs.clear()  # gigabytes
    for graph, attentions in (("condition", 0), ("denoise", 4)):
        for precision in PRECISIONS[:3]:
            built = build_apart(tmp_path / f"{graph}.onnx", tmp_path, precision)
            whole = attentions if precision != "fp32" else 0
            assert (built.whole_attention, built.decomposed_attention) == (whole, attentions - whole)


def available():
    """Bytes of memory that are free or can be freed; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
def test_wan_in_full_depth_builds(tmp_path):
    """30 blocks, 832 by 480, 81 frames, in bf16; says how many layers, and which attention stayed whole."""
    from conceptmaster.export.onnx_graphs.trace import export_graph

    memory, disk = available(), shutil.disk_usage(tmp_path).free
    if memory < FULL_DEPTH[0] << 30 or disk < FULL_DEPTH[1] << 30:
        pytest.skip(
            f"needs {FULL_DEPTH[0]} GiB of memory and {FULL_DEPTH[1]} GiB of disk, "
            f"{memory >> 30} and {disk >> 30} are free"
        )
    size = {"frames": 81, "height": 480, "width": 832}
    path = tmp_path / "bundle" / "denoise.onnx"
    path.parent.mkdir()
    export_graph(dataclasses.replace(wan(30, size)["denoise"], external=True), path)
    built = build(path, tmp_path, "bf16", 89)
    print(f"{built.layers} layers, {len(built.engine) / 2**30:.2f} GiB; whole: {built.whole_attention}")
    assert attention(built) == (90, 0)


def put_beside(folder, graph):
    """Moves a bundle's weights of one graph into a file beside it, as those of large bases are."""
    manifest, path = load(folder), folder / f"{graph}.onnx"
    ir.save(ir.load(path), path, external_data=f"{path.name}.data")
    files = [HashedFile(p.name, sha256_file(p)) for p in (path, path.with_name(f"{path.name}.data"))]
    changed = dataclasses.replace(manifest.graphs[graph], sha256=files[0].sha256, external=(files[1],))
    save(dataclasses.replace(manifest, graphs=manifest.graphs | {graph: changed}), folder)


def test_the_command_writes_engines_that_are_vouched_for(bundle, tmp_path, capsys):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    put_beside(folder, "denoise")
    arguments = [
        "build",
        str(folder),
        "--flavor",
        "rtx",
        "--target",
        "sm_89",
        "--precision",
        "fp32",
        "--json",
    ]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    version = stored.short_version(trt.__version__)
    found = Bundle.open(folder)
    files, engines = stored.choose(found, "rtx", version, 89)
    place = files.folder
    assert str(place) == report["folder"] and engines.plugin_abi == 0 and engines.precision == "fp32"
    assert {line["graph"] for line in report["engines"]} == set(found.manifest.graphs)
    assert all(sha256_file(place / e.file) == e.sha256 for e in engines.engines.values())
    assert not list(place.glob(".*"))  # no prepared graph is left


def test_a_graph_that_tensorrt_cannot_take_names_node_and_operator(tmp_path):
    graph = SHIPPED / "sprites-int8" / "denoise.onnx"
    with pytest.raises(
        ExportError, match="node 'add_2_QuantizeLinear', operator DynamicQuantizeLinear: .* more nodes"
    ):
        builder.build(trt, graph, 89, Limits())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--flavor", "rtx", "--target", "sm_90"],
            "--target sm_90: TensorRT for RTX builds for one of sm_75",
        ),
        (["--flavor", "rtx"], "no --target: TensorRT for RTX builds for one of"),
        (["--target", "H100"], "'H100' is no target: write sm_"),
        (["--dry-run"], "--dry-run, --collect and --trtexec-version go with --trtexec"),
        (["--trtexec", "--collect", "--target", "sm_90"], "build.log' is not there: run "),
        (
            ["--trtexec", "--dry-run", "--target", "sm_90", "--trtexec-version", "ten"],
            "'ten': write it as 10.13",
        ),
        (["--trtexec", "--flavor", "rtx"], "leave out --flavor"),
        (["--precision", "int4"], "invalid choice"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, capsys):
    assert main(["build", "sprites", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_int8_bundle_is_refused(tmp_path, capsys):
    folder = tmp_path / "bundle"
    shutil.copytree(SHIPPED / "sprites-int8", folder)
    assert main(["build", str(folder), "--trtexec", "--dry-run", "--target", "sm_90"]) == 2
    assert "is in int8 for CPUs" in capsys.readouterr().err
