"""What `serve` refuses before anything is loaded, in one line."""

from __future__ import annotations

import pytest

from conceptmaster.cli import main


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--step-timeout", "0"], "--step-timeout must be more than 0 seconds, not 0"),
        (["--step-timeout", "nan"], "--step-timeout must be more than 0 seconds, not nan"),
        (["--idle", "-1"], "--idle must be 0 or more, not -1"),
        (["--max-workers", "2"], "--max-workers goes with --ray"),
        (["--gpus-per-worker", "2"], "several GPUs is for the backend torch, not onnxruntime"),
        (["--gpus-per-worker", "2", "--backend", "torch", "--gpu", "0"], "--gpu 0 names 1 GPU of a worker"),
        (["--max-workers", "0", "--ray", "local"], "--max-workers must be 1 to 4096, not 0"),
        (["--max-workers", "2", "--workers", "3", "--ray", "local"], "is less than --workers 3"),
    ],
)
def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str], options: list[str], word: str) -> None:
    assert main(["serve", *options]) == 2
    captured = capsys.readouterr()
    assert word in captured.err and captured.err.count("\n") == 1 and captured.out == ""
