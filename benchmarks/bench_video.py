"""A whole video from the shipped bundles: the first example request, default steps, one thread.

Beside them the same graphs in OpenVINO, where that is installed, with NNCF also in OpenVINO's own 8 bits,
and in PyTorch. BEFORE=FOLDER names one more bundle, of an earlier export, that takes its turn first: what
the others are compared with.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import pytest

from conceptmaster.runtime.bundle_format import find as bundles

from .alternating import alternate, report
from .reports import ROOT

ROUNDS = 10
REQUEST = ROOT / "examples/sprites/requests/first/request.json"
NAMES = ("sprites", "sprites-int8")
TORCH = "sprites, torch backend"
BEFORE = "BEFORE"


def test_video(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Pipelines are open already and have generated once; the caption is encoded anew each time."""
    from conceptmaster import Pipeline
    from conceptmaster.runtime.request import Request

    names = [name for name in NAMES if name in bundles.shipped()]
    if not names or not REQUEST.is_file():
        pytest.skip("no bundle is shipped with this checkout, or no example request")
    request = Request.from_json(REQUEST)
    earlier = {BEFORE: os.environ[BEFORE]} if os.environ.get(BEFORE) else {}
    bundles_by_name = earlier | {name: name for name in names}
    pipelines = {name: Pipeline.from_bundle(b, threads=1) for name, b in bundles_by_name.items()}
    if importlib.util.find_spec("openvino"):
        from .openvino_backend import OpenVinoBackend

        for name, bundle in bundles_by_name.items():
            opened = bundles.Bundle.open(bundle)
            pipelines[f"{name}, openvino"] = Pipeline(opened, OpenVinoBackend(opened, 1))
        if importlib.util.find_spec("nncf") and "sprites" in names:
            opened = bundles.Bundle.open("sprites")
            eight = OpenVinoBackend(opened, 1, compressed=("denoise",))
            pipelines["sprites, openvino int8 (NNCF)"] = Pipeline(opened, eight)
    if "sprites" in names and all(importlib.util.find_spec(name) for name in ("torch", "diffusers")):
        import torch

        torch.set_num_threads(1)
        pipelines[TORCH] = Pipeline.from_bundle("sprites", backend="torch")
    stages: dict[str, dict[str, float]] = {}

    def generate(name: str) -> None:
        pipelines[name]._text.cache_clear()
        pipelines[name]._pictured.clear()
        stages[name] = dict(pipelines[name].generate(request)[0].seconds)

    measured = alternate(
        benchmark, {name: functools.partial(generate, name) for name in pipelines}, ROUNDS, warmup=1
    )
    benchmark.extra_info["stages_of_the_last_round_s"] = stages
    with capsys.disabled():
        print(report(measured, "whole video, default steps, 1 thread"))
        for name, seconds in stages.items():
            print(f"  {name:34} " + ", ".join(f"{stage} {s * 1e3:.1f} ms" for stage, s in seconds.items()))
