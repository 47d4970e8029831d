"""Graphs of fewer text tokens (`export --text-tokens`) against those of the whole text: ONNX Runtime on
one thread, in turn. Weights are random; nothing here depends on their values.

A base like Wan2.1 with a text of 512 tokens, small enough for a CPU: 4 blocks of width 512 and 720 video
tokens, where text is a fair part of the work. And the `sprites` preset, whose text has 48.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from .alternating import alternate, report

pytest.importorskip("torch")
pytest.importorskip("diffusers")

GRAPHS = {"text_encoder": 30, "condition": 30, "denoise": 20}
"""Graph -> rounds."""


def wan_like() -> Any:
    """The configuration of the small base."""
    from conceptmaster.engine.presets import preset

    config, tiny = preset("wan2.1-1.3b"), preset("tiny")
    text = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 8}
    small: dict[str, Any] = {"num_layers": 4, "num_attention_heads": 4, "ffn_dim": 2048, "text_dim": 512}
    return replace(
        config,
        transformer=replace(config.transformer, **small),
        concept=replace(config.concept, picture_size=16, picture_tokens=4, picture_dim=16),
        text_encoder=tiny.text_encoder | text,
        image_encoder=tiny.image_encoder,
        vae=config.vae | {"base_dim": 8},
        frames=17,
        height=192,
        width=192,
    )


@pytest.fixture(scope="module", params=[("wan-like", 160), ("sprites", 32)], ids=lambda pair: pair[0])
def specs(request: pytest.FixtureRequest) -> Any:
    """Name, and of each graph the specs by what they are called here."""
    from conceptmaster.engine.checkpoints.source import random_source
    from conceptmaster.engine.presets import preset
    from conceptmaster.export.graphs import graph_specs
    from conceptmaster.export.recipes import text_of

    name, tokens = request.param
    source = random_source(wan_like() if name == "wan-like" else preset(name))
    config, whole = text_of(source.model.config, tokens)
    kinds = {
        f"{whole} tokens": graph_specs(source.model, source.vae),
        f"{tokens} tokens": graph_specs(source.model, source.vae, config=config, whole_text=whole),
    }
    return name, {graph: {k: _named(found, graph) for k, found in kinds.items()} for graph in GRAPHS}


def _named(specs: list[Any], name: str) -> Any:
    return next(spec for spec in specs if spec.name == name)


@pytest.mark.parametrize("graph", list(GRAPHS))
def test_text_tokens(
    benchmark: Any, specs: Any, graph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same graph of both, on inputs of its own size."""
    from conceptmaster.export.onnx_graphs.trace import export_graph
    from conceptmaster.export.verify import open_session

    name, found = specs
    rivals = {}
    for kind, spec in found[graph].items():
        path = tmp_path / kind / "graph.onnx"
        path.parent.mkdir()
        export_graph(spec, path)
        session, sample = open_session(str(path), path), spec.sample(0)
        feed = {tensor.name: sample[tensor.name].numpy() for tensor in session.get_inputs()}
        rivals[kind] = functools.partial(session.run, None, feed)
    measured = alternate(benchmark, rivals, GRAPHS[graph])
    with capsys.disabled():
        print(report(measured, f"{graph}, {name}, 1 thread"))
