"""A queue that grows brings up a machine, which goes when the queue has become short.

Ray's own autoscaler does it, with its provider whose machines are processes here. Takes a minute.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from conceptmaster.benchmarks.ray_nodes import ENVIRONMENT, called

from .conftest import LONG, waited

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

CONFIGURATION = {
    "cluster_name": "default",
    "max_workers": 2,
    "idle_timeout_minutes": 0.1,
    "upscaling_speed": 1.0,
    "available_node_types": {
        "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
    **dict.fromkeys(("auth", "docker", "file_mounts"), {}),
    **dict.fromkeys(
        (
            *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
            *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
            *("rsync_exclude", "rsync_filter"),
        ),
        [],
    ),
    "file_mounts_sync_continuously": False,
}


class Cluster:
    """A head without CPUs, and nodes with one each as they are wanted."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._folder = folder
        provider = {"type": "fake_multinode", "gcs_address": self.address, "disable_node_updaters": True}
        provider |= {"use_node_id_as_ip": True, "disable_launch_config_check": True}
        file = folder / "autoscaling.json"
        file.write_text(json.dumps({**CONFIGURATION, "provider": provider}))
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
        command += ["--node-ip-address=127.0.0.1", f"--port={self.address.rpartition(':')[2]}"]
        command += ["--include-dashboard=false", f"--temp-dir={folder}", f"--autoscaling-config={file}"]
        own = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        with (folder / "head.log").open("w") as log:
            self._head = subprocess.Popen(
                command, env=environment | ENVIRONMENT | own, stdout=log, stderr=log, start_new_session=True
            )
        waited(lambda: "Ray runtime started" in (folder / "head.log").read_text())

    def nodes(self) -> int:
        """How many there are beside the head."""
        return sum("raylet/raylet" in called(pid) for pid in self._processes()) - 1

    def close(self) -> None:
        """Ends all of it."""
        while found := self._processes():
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._head.poll()

    def _processes(self) -> list[int]:
        every = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())
        return [pid for pid in every if str(self._folder) in called(pid)]


@pytest.fixture
def cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    """One of its own, with its folder where paths of sockets are short."""
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        running = Cluster(Path(folder), environment)
        try:
            yield running
        finally:
            running.close()


def test_a_queue_that_grows_brings_up_a_node_which_goes_again(
    serving: Callable, cluster: Cluster, tmp_path: Path
) -> None:
    options = ("--ray", cluster.address, "--max-workers", "2", "--idle", "2")
    assert cluster.nodes() == 0
    with serving(*options, data=tmp_path / "jobs", more=ENVIRONMENT) as server:
        assert cluster.nodes() == 1  # of the worker that is always there
        asked = [server.ask(**LONG)["id"] for _ in range(3)]
        metrics = server.http.get("/metrics").text
        assert "conceptmaster_workers_wanted 2.0" in metrics and "conceptmaster_workers_ready 1.0" in metrics
        waited(lambda: sum(server.get(id)["status"] == "in_progress" for id in asked) == 2)
        assert cluster.nodes() == 2
        for id in asked:
            server.http.post(f"/v1/videos/{id}/cancel")
        waited(lambda: cluster.nodes() == 1)
        metrics = server.http.get("/metrics").text
        assert "conceptmaster_workers_wanted 1.0" in metrics and "conceptmaster_workers_ready 1.0" in metrics
        assert server.http.get("/health/ready").status_code == 200
        assert server.wait(server.ask()["id"])["status"] == "completed"
        assert "Traceback" not in server.log.read_text()
