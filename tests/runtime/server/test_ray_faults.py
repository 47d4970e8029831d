"""What goes wrong between a server, Ray and its nodes, done for real: minutes, so slow."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

import conceptmaster
from conceptmaster.benchmarks.ray_nodes import ENVIRONMENT, Nodes, below, called

from .conftest import Server, waited
from .test_faults import SLOW, in_progress

pytestmark = pytest.mark.slow


@pytest.fixture
def join(serving: Callable, nodes: Nodes, tmp_path: Path) -> Callable[..., AbstractContextManager[Server]]:
    """`with join("--option", …) as server:`, a server whose jobs are kept."""

    def start(*options: str) -> AbstractContextManager[Server]:
        return serving("--ray", nodes.address, *options, data=tmp_path / "jobs", more=ENVIRONMENT)

    return start


def gateway(server: Server) -> int:
    (pid,) = [pid for pid in server.workers() if "runtime.workers.gateway" in called(pid)]
    return pid


def test_a_gateway_that_is_killed_is_started_again(
    join: Callable,
    nodes: Nodes,
    right: Callable[..., bytes],
) -> None:
    with join() as server:
        id = server.ask(seed="4", **SLOW)["id"]
        server.wait(id, in_progress)
        (worker,) = nodes.workers(nodes.head)
        os.kill(gateway(server), signal.SIGKILL)
        assert server.wait(id)["status"] == "completed"
        assert server.content(id) == right(4, steps=1000, samples=3)
        assert worker not in nodes.workers(nodes.head)
        assert "the process that speaks with Ray ended (signal 9)" in server.log.read_text()


def test_a_node_that_was_cut_off_counts_for_nothing_when_it_comes_back(
    join: Callable,
    nodes: Nodes,
    right: Callable[..., bytes],
) -> None:
    second = nodes.add()
    with join("--workers", "2") as server:
        waited(lambda: server.http.get("/health/ready").json()["workers"] == 2)
        asked = [server.ask(seed=str(seed), **SLOW)["id"] for seed in range(2)]
        for id in asked:
            server.wait(id, in_progress)
        (worker,) = nodes.workers(second)
        nodes.signal(second, signal.SIGSTOP)
        for id in asked:
            assert server.wait(id)["status"] == "completed"
        waits = "a worker for fake waits: no node has 1 CPUs free; in all, the nodes have: 1 CPUs\n"
        waited(lambda: waits in server.log.read_text())
        before = [(server.get(id), server.content(id)) for id in asked]
        nodes.signal(second, signal.SIGCONT)
        waited(lambda: not called(worker))  # its node ends itself: the others hold it for dead
        assert [(server.get(id), server.content(id)) for id in asked] == before
        for seed, (_, content) in enumerate(before):
            assert content == right(seed, steps=1000, samples=3)
        assert server.wait(server.ask()["id"])["status"] == "completed"


def test_a_head_that_is_started_again(
    serving: Callable,
    environment: dict[str, str],
    right: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    with (
        Nodes(environment=environment) as nodes,
        serving("--ray", nodes.address, data=tmp_path / "jobs", more=ENVIRONMENT) as server,
    ):
        id = server.ask(seed="4", **SLOW)["id"]
        server.wait(id, in_progress)
        nodes.start_head_again()
        assert server.wait(id)["status"] == "completed"
        assert server.content(id) == right(4, steps=1000, samples=3)
        assert server.wait(server.ask()["id"])["status"] == "completed"


def test_a_node_with_another_version_is_named(
    serving: Callable, environment: dict[str, str], tmp_path: Path
) -> None:
    root, other = Path(conceptmaster.__file__).parent, tmp_path / "path" / "conceptmaster"
    other.mkdir(parents=True)
    for path in root.iterdir():
        if path.name != "__init__.py":
            (other / path.name).symlink_to(path)
    text = (root / "__init__.py").read_text()
    (other / "__init__.py").write_text(text.replace(conceptmaster.__version__, "0.0.7"))
    with Nodes(0, environment=environment) as nodes:
        nodes.add(env={"PYTHONPATH": str(tmp_path / "path")})
        said = fails_to_start(serving, nodes)
    wanted = f"has conceptmaster 0.0.7, the server {conceptmaster.__version__}: install the same there"
    assert re.search(rf"error: no worker came up: node \S+ {re.escape(wanted)}$", said, re.MULTILINE)


def test_a_node_without_what_is_needed_is_told(
    serving: Callable, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "conceptmaster").mkdir()
    (tmp_path / "conceptmaster" / "__init__.py").touch()
    with Nodes(0, environment=environment) as nodes:
        nodes.add(env={"PYTHONPATH": str(tmp_path)})
        said = fails_to_start(serving, nodes)
    assert f"a node has no conceptmaster {conceptmaster.__version__}: install it there" in said


def fails_to_start(serving: Callable, nodes: Nodes) -> str:
    """What a server says that ends."""
    with pytest.raises(AssertionError) as caught, serving("--ray", nodes.address, more=ENVIRONMENT):
        pass
    return str(caught.value)


@pytest.fixture
def apart(environment: dict[str, str], bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Nodes]]:
    """`apart("command")`: a node that does not see the bundle; tmp_path / "cache" is its cache."""
    pytest.importorskip("ray")
    (tmp_path / "cache").mkdir()
    with Nodes(0, environment=environment) as nodes:

        def add(command: str = "true") -> Nodes:
            try:
                hide = f"mount -t tmpfs none {bundle.parent}; {command}"
                nodes.add_apart(hide, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
            except OSError:
                pytest.skip("no mounts of its own are allowed here")
            return nodes

        yield add


def test_a_bundle_is_brought_to_a_node_once_and_again_where_it_is_damaged(
    apart: Callable[..., Nodes],
    join_to: Callable,
    tmp_path: Path,
    right: Callable[..., bytes],
) -> None:
    nodes = apart()
    contents = []
    for damage in (False, False, True):
        graphs = sorted((tmp_path / "cache").rglob("denoise.onnx"))
        assert len(graphs) == bool(contents)
        before = [path.stat().st_mtime_ns for path in graphs]
        if damage:
            data = bytearray(graphs[0].read_bytes())
            data[len(data) // 2] ^= 1
            graphs[0].write_bytes(data)
        with join_to(nodes) as server:
            video = server.wait(server.ask(seed="3", steps="7")["id"])
            assert video["status"] == "completed"
            contents.append(server.content(video["id"]))
        (graph,) = (tmp_path / "cache").rglob("denoise.onnx")
        assert [graph.stat().st_mtime_ns] == before or damage or len(contents) == 1
    assert set(contents) == {right(3, steps=7)}
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.fixture
def join_to(serving: Callable) -> Callable[[Nodes], AbstractContextManager[Server]]:
    """`with join_to(nodes) as server:`."""
    return lambda nodes: serving("--ray", nodes.address, more=ENVIRONMENT)


def test_a_node_whose_disk_is_full_says_so(
    apart: Callable[..., Nodes], serving: Callable, tmp_path: Path
) -> None:
    nodes = apart(f"mount -t tmpfs -o size=32k none {tmp_path}/cache")
    said = fails_to_start(serving, nodes)
    assert re.search(r"node \S+ cannot have the bundle: .*(and '.*' has \d+ left|No space left)", said)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_ray_of_its_own_stays_on_this_machine_and_ends_with_its_server(
    serving: Callable, tmp_path: Path, right: Callable[..., bytes], sign: int
) -> None:
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        own = {"HOME": str(tmp_path), "TMPDIR": short, "RAY_memory_monitor_refresh_ms": "0"}
        with serving("--ray", "local", more=own, data=tmp_path / "jobs") as server:
            video = server.wait(server.ask(seed="3", steps="7")["id"])
            assert video["status"] == "completed" and server.content(video["id"]) == right(3, steps=7)
            parts = below(server.process.pid)
            assert any("ray::Actor" in called(pid) for pid in parts)
            listening = {address for pid in [server.process.pid, *parts] for address in addresses(pid)}
            assert listening == {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1
            server.stop(sign)
            waited(lambda: not any(map(called, parts)))
            assert "Traceback" not in server.log.read_text()
        waited(lambda: not list(Path(short).iterdir()))
    assert not (tmp_path / ".ray").exists()


def addresses(pid: int) -> set[str]:
    """At which a process listens, as the kernel writes them."""
    sockets = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            sockets.add(os.readlink(path))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].rpartition(":")[0])
    return found


def test_random_kills_lose_nothing(environment: dict[str, str]) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "conceptmaster.benchmarks.serving", "--nodes", "2", "--requests", "60"]
    options = ["--kills", "6", "--plain", "0", "--clients", "10"]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["faults"]
    assert sum(found["kills"].values()) >= 4 and sum(found["became"].values()) == 60
