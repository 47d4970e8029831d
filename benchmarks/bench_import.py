"""What `import conceptmaster` costs: a fresh interpreter that imports it against one that imports nothing."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .alternating import alternate, report

ROUNDS = 30
CODE = {
    "nothing": "pass",
    "command line": "import conceptmaster.cli",
    "Pipeline": "from conceptmaster import Pipeline",
    "import conceptmaster": "import conceptmaster",
}


def test_import(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole processes, from start to exit."""

    def start(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)

    measured = alternate(
        benchmark, {name: functools.partial(start, code) for name, code in CODE.items()}, ROUNDS
    )
    with capsys.disabled():
        print(report(measured, "a fresh interpreter importing"))
