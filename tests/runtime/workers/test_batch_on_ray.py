"""A batch on the nodes of a Ray cluster: what it writes is what one pipeline writes, whichever node dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conceptmaster.benchmarks.ray_nodes import ENVIRONMENT, Nodes, below, called

from ..server.conftest import waited
from ..test_batch import arguments, batch, cat, requests, statuses  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
STEPS = 1000  # a second or so
Batch = Callable[..., dict[str, Any]]


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_ray_of_its_own_makes_the_same_and_ends(batch: Batch) -> None:  # noqa: F811
    pytest.importorskip("ray")
    requests(cat(seed=3, name="one"), {"prompt": "a ball rolls left", "samples": 2, "seed": 8})
    for folder, more in (("here", ()), ("there", ("--ray", "local", "--jobs", "2"))):
        Path(folder).mkdir()
        report = batch("--sheet", f"{folder}/{{name}}.png", *more, output=f"{folder}/{{name}}.mp4")
        assert (statuses(report), report["said"]) == (["made"] * 2, "")
    assert files("there") == files("here")
    waited(lambda: not [pid for pid in below(os.getpid()) if "ray" in called(pid)])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """The head, which makes nothing."""
    pytest.importorskip("ray")
    for name, value in ENVIRONMENT.items():  # of this process, which joins
        monkeypatch.setenv(name, value)
    with Nodes(cpus=0) as running:
        yield running


@contextmanager
def running(bundle: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A batch of its own process, once it has made something."""
    process = subprocess.Popen(
        [sys.executable, "-m", "conceptmaster", *arguments(bundle, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None and process.stdout.readline().startswith("out/")
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_node_that_dies_in_the_middle_of_a_batch_loses_nothing(
    batch: Batch,  # noqa: F811
    bundle: Path,
    cluster: Nodes,
) -> None:
    requests(*(cat(seed=seed, steps=STEPS) for seed in range(10)))
    batch()
    right = files("out")
    for path in Path("out").iterdir():
        path.unlink()
    first, second = cluster.add(), cluster.add()
    with running(bundle, "--ray", cluster.address, "--jobs", "2") as process:
        waited(lambda: cluster.workers(first) and cluster.workers(second))
        made = len(list(Path("out").glob("*.npy")))
        waited(lambda: len(list(Path("out").glob("*.npy"))) >= made + 3)
        cluster.kill(second)
        out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "10 made, 0 kept from earlier" in out and "Traceback" not in said
    assert "conceptmaster: error: a worker for fake: " in said
    assert files("out") == right
    assert statuses(batch()) == ["kept"] * 10


def test_an_interrupt_ends_what_is_on_the_nodes(
    batch: Batch,  # noqa: F811
    bundle: Path,
    cluster: Nodes,
) -> None:
    requests(*(cat(seed=seed, steps=STEPS) for seed in range(6)))
    node = cluster.add()
    with running(bundle, "--ray", cluster.address) as process:
        (worker,) = cluster.workers(node)
        os.kill(worker, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, "conceptmaster: error: interrupted\n")
    waited(lambda: not cluster.workers(node) and not called(worker))
    report = batch("--ray", cluster.address)
    assert report["made"] + report["kept"] == 6 and report["kept"] > 0
