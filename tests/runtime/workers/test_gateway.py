"""The process that speaks with Ray, sent to somebody who takes connections and says nothing."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("ray")

PROGRAM = """
import sys
from conceptmaster.runtime.workers import gateway
gateway.JOINING = float(sys.argv[1])
sys.exit(gateway.main())
"""
Start = Callable[[float], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the process, and returns when it has found that somebody listens there."""
    pipe = subprocess.PIPE
    started: list[subprocess.Popen[str]] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(60)

        def start(joining: float) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", PROGRAM, str(joining)]
            started.append(process := subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
            address = f"127.0.0.1:{listening.getsockname()[1]}"
            assert process.stdin is not None
            process.stdin.write(json.dumps({"address": address, "cpus": 1, "verbose": False}) + "\n")
            process.stdin.flush()
            listening.accept()[0].close()
            return process

        yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_port_where_nobody_speaks_is_given_up(start: Start) -> None:
    process = start(2.0)
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    assert said["say"] == "lost"
    assert said["message"].endswith("has not answered as its head for 2 seconds")
    assert process.wait(20) == 1


def test_nobody_joins_when_the_server_is_gone(start: Start) -> None:
    process = start(3600.0)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    assert process.wait(20) == 1
    assert process.stdout.read() == ""
    process.stdin = None
