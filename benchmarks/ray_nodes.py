"""Several Ray nodes on this machine, to be killed: for tests, and for serving.py with --nodes.

    with Nodes() as nodes:
        node = nodes.add()
        … --ray nodes.address …
        nodes.kill(node)

They are held by a process of its own, `python -m conceptmaster.benchmarks.ray_nodes`, so that nothing of Ray
stays in this one. All of it listens at 127.0.0.1 alone and reports nothing. Linux only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # off: all of it stays at 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "known-to-all-who-read-this-but-heard-of-on-this-machine-alone",
}
"""Of whoever joins, too."""
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 4,
}
"""A node that does not answer is dead after some seconds."""
PATIENCE = 120.0
Holder: TypeAlias = "subprocess.Popen[str]"


class Nodes:
    """The nodes; a node is called by its raylet's process id. cpus: of the first node, the head."""

    def __init__(self, cpus: int = 1, environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # paths of sockets are short
        Path(self._folder, "ray").mkdir()
        self.environment = dict(environment or os.environ) | ENVIRONMENT
        self._holders = [self._start()]
        answer = _ask(self._holders[0], cpus=cpus)
        self.address, self.head = str(answer["address"]), int(answer["node"])

    def add(self, cpus: int = 1, env: Mapping[str, str] | None = None) -> int:
        """Another node. env: of its environment."""
        return int(_ask(self._holders[0], cpus=cpus, env=env)["node"])

    def add_apart(self, command: str, cpus: int = 1, env: Mapping[str, str] | None = None) -> int:
        """Another node, with mounts of its own, after a command for the shell. Raises OSError where this is
        not allowed."""
        prefix = ["unshare", "--mount", "sh", "-ec", f'{command}; exec "$@"', "sh"]
        self._holders.append(self._start(prefix, env))
        return int(_ask(self._holders[-1], cpus=cpus, join=self.address)["node"])

    def start_head_again(self) -> None:
        """The head dies, with what only it knows, and another one starts at its address."""
        self.head = int(_ask(self._holders[0], again=True)["node"])

    def kill(self, node: int) -> None:
        """All processes of a node at once, as when a machine dies."""
        self.signal(node, signal.SIGKILL)

    def signal(self, node: int, sign: int) -> None:
        """A signal to all processes of a node."""
        for pid in [node, *below(node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)

    def actors(self, *nodes: int) -> list[int]:
        """Processes of workers' actors."""
        return [pid for node in nodes for pid in below(node) if "ray::Actor" in called(pid)]

    def workers(self, *nodes: int) -> list[int]:
        """The processes that make videos."""
        return [pid for node in nodes for pid in below(node) if "runtime.workers.worker" in called(pid)]

    def close(self) -> None:
        """Ends all of them."""
        for holder in reversed(self._holders):
            with contextlib.suppress(subprocess.TimeoutExpired):
                holder.communicate(timeout=PATIENCE)
            holder.kill()
            holder.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _start(self, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Holder:
        command = [*prefix, sys.executable, "-m", "conceptmaster.benchmarks.ray_nodes"]
        own = {"RAY_TMPDIR": self._folder, **(env or {})}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=self.environment | own)


def _ask(holder: Holder, **told: Any) -> dict[str, Any]:
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.write(json.dumps(told) + "\n")
    holder.stdin.flush()
    answer = json.loads(holder.stdout.readline() or '{"error": "the process that holds them has ended"}')
    if "error" in answer:
        raise OSError(answer["error"])
    return dict(answer)


def below(pid: int) -> list[int]:
    """Processes that a process has started, and what these have."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *below(child)]
    return found


def called(pid: int) -> str:
    """How a process was called, or calls itself; "" once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


# The process that holds them.


def main() -> int:
    """Until the end of its input."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for line in sys.stdin:
        try:
            answer = _do(cluster, json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
    cluster.shutdown()
    return 0


def _do(cluster: Any, told: dict[str, Any]) -> dict[str, Any]:
    common = {"num_cpus": told.get("cpus", 1), "node_ip_address": "127.0.0.1"}
    if "join" in told:
        node = _join(told["join"], common)
    elif cluster.head_node is None or "again" in told:
        own = {"include_dashboard": False, "include_log_monitor": False, "_system_config": HEALTH}
        if cluster.head_node is not None:
            own["gcs_server_port"] = int(cluster.address.rpartition(":")[2])
            cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
            cluster.head_node = None
        node = cluster.add_node(**common, **own)
    else:
        node = cluster.add_node(**common, env_vars=told["env"])
    (raylet,) = node.all_processes["raylet"]
    return {"address": node.gcs_address, "node": raylet.process.pid}


def _join(address: str, common: dict[str, Any]) -> Any:
    """As Cluster.add_node, for a cluster that another process holds."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    ports = {"min_worker_port": 0, "max_worker_port": 0, "node_manager_port": 0}
    own = {"gcs_address": address, "redis_address": address, "object_store_memory": 150 * 2**20}
    parameters = RayParams(**common, **ports, **own, num_gpus=0, include_log_monitor=False)
    parameters.dashboard_agent_listen_port = None
    return Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=True)


if __name__ == "__main__":
    sys.exit(main())
