"""Bases whose weights stay on disk: the same bundle, in the memory of the largest layer."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

SIZE = ("--size", "64x64", "--frames", "9", "--quiet")


@pytest.fixture
def streamed(monkeypatch):
    """Tiny weights stay on disk, too."""
    from conceptmaster.engine import streamed
    from conceptmaster.export import external

    monkeypatch.setattr(streamed, "LEAST", 64)
    monkeypatch.setattr(external, "LEAST", 64)


def test_a_base_on_disk_gives_the_bundle_of_one_in_memory(wan_folder, tmp_path, streamed, monkeypatch, run):
    from conceptmaster.cli import main
    from conceptmaster.engine.streamed import stored_weights
    from conceptmaster.export.source import Choices, open_source
    from conceptmaster.runtime.manifest import load

    assert main(["export", str(wan_folder), "--output", str(tmp_path / "disk"), *SIZE]) == 0
    assert main(["verify", str(tmp_path / "disk"), "--source", str(wan_folder), "--quiet"]) == 0
    monkeypatch.undo()
    assert main(["export", str(wan_folder), "--output", str(tmp_path / "memory"), *SIZE]) == 0
    disk, memory = (load(tmp_path / name) for name in ("disk", "memory"))
    assert all(graph.external for graph in disk.graphs.values())
    assert not any(graph.external for graph in memory.graphs.values())
    source = open_source(wan_folder, Choices((64, 64), 9))
    assert not stored_weights(source.model)
    from conceptmaster.export.graphs import graph_specs

    for spec in graph_specs(source.model, source.vae):
        paths = (tmp_path / folder / f"{spec.name}.onnx" for folder in ("disk", "memory"))
        found, expected = (run(path, spec.sample(2)) for path in paths)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=spec.name)
