"""Workers on two nodes of a Ray cluster on this machine, which are killed now and then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conceptmaster.benchmarks.ray_nodes import ENVIRONMENT, Nodes

from .conftest import LONG, PROMPT, Server, waited
from .test_faults import in_progress, refused

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def second(nodes: Nodes) -> int:
    """Another node, also with one."""
    return nodes.add()


@pytest.fixture(scope="module")
def served(serving: Callable, nodes: Nodes, second: int, tmp_path_factory: pytest.TempPathFactory) -> object:
    """A server with a worker on each."""
    data = tmp_path_factory.mktemp("data") / "jobs"
    with serving("--ray", nodes.address, "--workers", "2", data=data, more=ENVIRONMENT) as running:
        waited(lambda: running.http.get("/health/ready").json()["workers"] == 2)
        yield running


def test_two_nodes_make_what_one_process_makes(
    served: Server, nodes: Nodes, second: int, right: Callable[..., bytes], pictures: dict[str, Path]
) -> None:
    assert len(nodes.workers(nodes.head)) == len(nodes.workers(second)) == 1
    asked = [served.ask(seed=str(seed), steps="300")["id"] for seed in range(4)]
    pictured = [served.ask(pictures["ball"], seed="2")["id"] for _ in range(2)]
    waited(lambda: sum(served.get(id)["status"] == "in_progress" for id in asked) == 2)
    for seed, id in enumerate(asked):
        assert served.wait(id)["status"] == "completed"
        assert served.content(id) == right(seed, steps=300)
    for id in pictured:
        assert served.wait(id)["status"] == "completed"
    assert served.content(pictured[0]) == served.content(pictured[1]) != served.content(asked[2])
    for variant in ("thumbnail", "spritesheet"):
        place = f"/v1/videos/{asked[0]}/content?variant={variant}"
        assert served.http.get(place).headers["content-type"].startswith("image/")


def test_previews_and_cancelling_reach_a_node(served: Server, nodes: Nodes, second: int) -> None:
    before = sorted(nodes.workers(nodes.head, second))
    id = served.ask(**LONG)["id"]
    with served.http.stream("GET", f"/v1/videos/{id}/events") as stream:
        for line in stream.iter_lines():
            if line == "event: preview":
                assert served.http.get(f"/v1/videos/{id}/preview").content[8:12] == b"WEBP"
                break
    assert served.http.post(f"/v1/videos/{id}/cancel").json()["status"] == "cancelled"
    for other in [served.ask()["id"] for _ in range(3)]:
        assert served.wait(other)["status"] == "completed"
    assert served.get(id)["status"] == "cancelled"
    assert sorted(nodes.workers(nodes.head, second)) == before


def test_a_worker_that_is_killed_on_its_node_starts_again_there(
    served: Server, nodes: Nodes, second: int, right: Callable[..., bytes]
) -> None:
    actors = sorted(nodes.actors(nodes.head, second))
    asked = [served.ask(seed=str(seed), steps="1000")["id"] for seed in range(2)]
    for id in asked:
        served.wait(id, in_progress)
    for pid in nodes.workers(nodes.head, second):
        os.kill(pid, signal.SIGKILL)
    for seed, id in enumerate(asked):
        assert served.wait(id)["status"] == "completed"
        assert served.content(id) == right(seed, steps=1000)
    assert sorted(nodes.actors(nodes.head, second)) == actors
    assert "says: the worker's process ended (signal 9)" in served.log.read_text()


def test_a_node_that_dies_in_the_middle_loses_nothing(
    served: Server, nodes: Nodes, second: int, right: Callable[..., bytes]
) -> None:
    waited(lambda: served.http.get("/health/ready").json()["workers"] == 2)
    asked = [served.ask(seed=str(seed), steps="1000")["id"] for seed in range(2)]
    for id in asked:
        served.wait(id, in_progress)
    nodes.kill(second)
    for seed, id in enumerate(asked):
        assert served.wait(id)["status"] == "completed"
        assert served.content(id) == right(seed, steps=1000)
    assert served.http.get("/health/ready").json()["workers"] == 1
    third = nodes.add()
    waited(lambda: served.http.get("/health/ready").json()["workers"] == 2)
    assert len(nodes.workers(third)) == 1
    assert "Traceback" not in served.log.read_text()


def test_what_cannot_work_is_said_in_one_line(environment: dict[str, str], bundle: Path) -> None:
    pytest.importorskip("ray")
    ours = ["--bundle", str(bundle), "--port", "0", "--ray"]
    for given, wanted in (
        (["somewhere"], "--ray must be local, auto, or HOST:PORT of a cluster's head, not 'somewhere'"),
        (["ray://here:10001"], "--ray takes no ray://"),
        (["local", "--gpu", "0"], "with --ray, Ray gives each worker its GPUs"),
    ):
        code, said = refused(environment, *ours, *given)
        assert (code, said.count("\n")) == (2, 1) and wanted in said
    code, said = refused(environment, *ours, "127.0.0.1:1")
    assert code == 1 and "no Ray answers at 127.0.0.1:1: " in said.splitlines()[-1]


def test_nothing_imports_ray_unasked(environment: dict[str, str], bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise AssertionError('ray was imported')")
    path = f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"
    command = [sys.executable, "-m", "conceptmaster", "generate", "--bundle", str(bundle), "--prompt", PROMPT]
    video = tmp_path / "video.mp4"
    subprocess.run([*command, "--output", str(video)], env=environment | {"PYTHONPATH": path}, check=True)
    code = "import conceptmaster.runtime.server.server, sys; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment | {"PYTHONPATH": path}, check=True)
    assert video.exists()
