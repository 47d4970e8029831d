"""Every kernel in turn with its rivals at the shipped model's sizes; `make gpu` has all others.

Without a GPU the ops run their references in float32, so what is compared then is the arithmetic: one call
with a mask against two without, a projection folded in against one that follows.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from .alternating import alternate, report

torch = pytest.importorskip("torch")

from .gpu.case import Case, Shapes  # noqa: E402
from .gpu.cases import cases  # noqa: E402
from .gpu.check import check  # noqa: E402
from .gpu.timing import captured  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", "bfloat16") if ON_GPU else ("cpu", "float32")
SIZES = Shapes(DEVICE, small=False, only="sprites", dtype=DTYPE)
CASES = [case for group in cases(SIZES) for case in group.make()]
ROUNDS = 100


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_kernel(benchmark: Any, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is timed that is not right. On a GPU a call is a CUDA graph that is replayed and waited for."""

    def waited(call: Any) -> None:
        call()
        if ON_GPU:
            torch.cuda.synchronize()

    with torch.inference_mode():
        assert check(case)["ok"]
        calls = {**case.rivals, **(case.compiled if ON_GPU else {}), "ours": case.ours}
        measured = alternate(
            benchmark,
            {name: functools.partial(waited, captured(call)) for name, call in calls.items()},
            ROUNDS,
        )
    with capsys.disabled():
        print(report(measured, f"{case.name}, {case.dtype}, {SIZES.device}"))
