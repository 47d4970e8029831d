"""What the head's processor takes for a request, measured with a real server: the HTTP that
cluster_simulation.py leaves out, and the processes of Ray.

    python -m conceptmaster.benchmarks.head_cost [--requests N] [--ray-jobs N] [--write FILE]

First a server whose only worker is kept busy: N videos are asked for, each with two pictures, then asked
after, then one that is finished is fetched; the processor time of the server's process for one of each. Then
N videos of one step on a Ray of its own on this machine, by process. They are times of the processor, so that
others on this machine matter little.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from .ray_nodes import below
from .reports import commit, machine, write
from .serving import FOLDER, PATIENCE, TICKS, Options, Server, scene

LOOKS = 10  # for each video that was asked for
LARGE = 5 * 10**6  # bytes: about what a video of 832x480x81 and what goes with it take
KINDS = ("raylet", "gcs_server", "gateway", "ray::Actor", "workers.worker")


def post(http: httpx.Client, number: int, steps: int) -> str:
    """Asks for a video with two pictures; its id."""
    request = scene(1, steps)
    parts: list[Any] = [("prompt", (None, request["prompt"])), ("seed", (None, str(number)))]
    parts.append(("steps", (None, str(steps))))
    for concept in request["concepts"]:
        parts.append(("label", (None, concept["label"])))
        parts.append(("input_reference", (concept["image"], (FOLDER / concept["image"]).read_bytes())))
    answer = http.post("/v1/videos", files=parts)
    answer.raise_for_status()
    return str(answer.json()["id"])


def wait(http: httpx.Client, id: str, until: str) -> None:
    """Until a video has this status."""
    while (status := http.get(f"/v1/videos/{id}").json()["status"]) != until:
        assert status in ("queued", "in_progress"), status
        time.sleep(0.5)


def of_http(server: Server, requests: int) -> dict[str, Any]:
    """Milliseconds of the server's process for one of each."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        wait(http, done := post(http, 0, 1), "completed")
        wait(http, long := post(http, 0, 1000), "in_progress")
        file = server.folder / "videos" / done / "video-0.mp4"

        def spent(do: Callable[[int], Any], count: int) -> float:
            before = server.cpu()[0]
            for number in range(count):
                do(number)
            return round(1000 * (server.cpu()[0] - before) / count, 3)

        asked, content = list[str](), f"/v1/videos/{done}/content"
        found = {
            "post_ms": spent(lambda number: asked.append(post(http, number, 1)), requests),
            "get_ms": spent(lambda n: http.get(f"/v1/videos/{asked[n % requests]}"), LOOKS * requests),
            f"content_{file.stat().st_size}_bytes_ms": spent(lambda _: http.get(content), requests),
        }
        file.write_bytes(bytes(LARGE))
        found[f"content_{LARGE}_bytes_ms"] = spent(lambda _: http.get(content), requests)
        http.post(f"/v1/videos/{long}/cancel")
        for id in asked:
            http.delete(f"/v1/videos/{id}")
        return found


def of_ray(server: Server, jobs: int) -> dict[str, Any]:
    """Milliseconds of each process for one video, of two pictures and one step; polled now and then."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        wait(http, post(http, 0, 1), "completed")
        before = by_kind(server.process.pid)
        start = time.monotonic()
        last = [post(http, number, 1) for number in range(jobs)][-1]
        wait(http, last, "completed")
        after = by_kind(server.process.pid)
        seconds = time.monotonic() - start
    return {
        "ms_per_job": {kind: round(1000 * (after[kind] - before[kind]) / jobs, 1) for kind in after},
        "jobs_per_s": round(jobs / seconds, 2),
    }


def by_kind(pid: int) -> dict[str, float]:
    """The processor's seconds of a process and of all below it, by what they are."""
    found = dict.fromkeys(("server", *KINDS, "others"), 0.0)
    for one in (pid, *below(pid)):
        try:
            name = Path(f"/proc/{one}/cmdline").read_text().replace("\0", " ")
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        kind = "server" if one == pid else next((kind for kind in KINDS if kind in name[:200]), "others")
        found[kind] += sum(map(int, fields[11:13])) / TICKS
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptmaster.benchmarks.head_cost", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--requests", type=int, default=300, metavar="N", help="(300)")
    parser.add_argument("--ray-jobs", type=int, default=100, metavar="N", help="0 leaves Ray out (100)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the report goes, too")
    given = parser.parse_args(argv)
    report: dict[str, Any] = {
        "command": " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(("fastapi", "uvicorn", "ray")),
    }
    runs = [("http", of_http, given.requests, ()), ("ray", of_ray, given.ray_jobs, ("--ray", "local"))]
    for name, measure, count, more in runs:
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = Options("sprites", count, 1, 0, 0, count + 10, 1, 1, 0, 0, 0)
            server = Server(options, Path(folder), None, *more)
            try:
                report[name] = measure(server, count)
                server.stop()
            finally:
                server.process.kill()
    print(json.dumps(report, indent=1))
    if given.write is not None:
        write(report, given.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
