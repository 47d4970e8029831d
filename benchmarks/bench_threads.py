"""The default number of threads against one: a whole video from each shipped bundle, in turn.

The default should be as fast as one thread, to 3 %, whatever else the machine does.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from conceptmaster.runtime import cpus
from conceptmaster.runtime.bundle_format import find as bundles

from .alternating import alternate, report
from .reports import ROOT

ROUNDS = 30
REQUEST = ROOT / "examples/sprites/requests/first/request.json"


@pytest.mark.parametrize("bundle", ["sprites", "sprites-int8"])
def test_threads(benchmark: Any, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Pipelines are open already and have generated once."""
    from conceptmaster import Pipeline
    from conceptmaster.runtime.request import Request

    if bundle not in bundles.shipped() or not REQUEST.is_file():
        pytest.skip("the bundle is not shipped with this checkout, or no example request")
    request = Request.from_json(REQUEST)
    default = f"the default, {cpus.usable()}"
    pipelines = {
        "one thread": Pipeline.from_bundle(bundle, threads=1),
        default: Pipeline.from_bundle(bundle),
    }
    videos = {name: functools.partial(pipeline.generate, request) for name, pipeline in pipelines.items()}
    measured = alternate(benchmark, videos, ROUNDS, warmup=1)
    with capsys.disabled():
        print(report(measured, f"a whole video from {bundle}, by threads"))
