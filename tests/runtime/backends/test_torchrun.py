"""Whose ranks the environment tells of."""

import pytest

from conceptmaster.runtime.backends import torchrun
from conceptmaster.runtime.cli import main

SET = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("others", "found"),
    [
        ({}, (1, 4, 0)),
        ({"MASTER_ADDR": ""}, (0, 1, 0)),  # of MPI or Slurm
        ({"WORLD_SIZE": "four"}, (0, 1, 0)),
        ({"RANK": "first"}, (0, 1, 0)),
        ({"RANK": "4"}, (0, 1, 0)),
        ({"LOCAL_RANK": "-1"}, (0, 1, 0)),
        ({"WORLD_SIZE": "-4"}, (0, 1, 0)),
    ],
)
def test_only_what_torchrun_says_counts(
    others: dict[str, str], found: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SET, **others}.items():
        monkeypatch.setenv(name, value)
    assert (torchrun.rank(), torchrun.world(), torchrun.local_rank()) == found


def test_another_number_of_gpus_than_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**SET, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "--prompt", "a cat", "--backend", "torch", "--gpus-per-worker", "3"]) == 2
    said = "torchrun has started 4 ranks, --gpus-per-worker says 3: leave it out"
    assert capsys.readouterr().err == f"conceptmaster: error: {said}\n"
