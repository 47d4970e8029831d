"""A server under load: is anything lost or wrong, what does it wait, what does it cost? No GPU is needed.

    python -m conceptmaster.benchmarks.serving [--requests N] [--plain N] [--clients N] … [--write FILE]

So many clients ask a server for videos, poll as OpenAI's client does, cancel and delete some, and download
and compare the rest with what `conceptmaster generate --requests` makes, while workers are killed now and
then (SIGKILL); all of it by one seed, but for the moments. Then (--plain) without any of that, in turn with
`generate --requests` alone, round by round, as a machine that others use is not always as fast: throughput
by the clock, and by processor time, of the workers alone and of all. The clients' own time is the machine's,
too. `--requests 0` or `--plain 0` leaves one out. With `--nodes N` the workers are on so many Ray nodes of
this machine, one on each, and what is killed is a worker's process, its actor, a node, or the gateway to Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from .ray_nodes import Nodes, below
from .reports import ROOT, commit, machine, write

ROUNDS = 6
PICTURES = {"flower": "1.png", "rocket": "2.png"}
FOLDER = ROOT / "examples/sprites/requests/first"
SCENES = 12
CANCELLED, DELETED = 0.08, 0.04  # of the requests
SHARES = (4, 3, 2, 1)  # of kills, of workers' processes, actors, nodes and the gateway
SAMPLE = 1.0  # seconds between two looks at the memory
PATIENCE = 600.0
TICKS = os.sysconf("SC_CLK_TCK")
PACKAGES = ("numpy", "onnxruntime", "fastapi", "starlette", "uvicorn", "sse-starlette", "ray")
PROGRAM = [sys.executable, "-m", "conceptmaster"]


@dataclasses.dataclass(frozen=True)
class Options:
    """See --help."""

    bundle: str
    requests: int
    steps: int
    plain: int
    plain_steps: int
    clients: int
    workers: int
    threads: int
    seed: int
    nodes: int
    kills: int


def scene(number: int, steps: int) -> dict[str, Any]:
    """A request as `generate` takes it, one of SCENES."""
    label = list(PICTURES)[number % 2]
    concepts = [
        {"label": name, "image": file} for name, file in PICTURES.items() if number % 3 or name == label
    ]
    prompt = "a flower in the middle moves down and a rocket on the left moves up"
    if len(concepts) == 1:
        prompt = f"a {label} in the middle moves down"
    return {"prompt": prompt, "concepts": concepts, "seed": number, "steps": steps}


def rate(files: Sequence[Path]) -> float:
    """Files a second, from the first one's end to the last one's."""
    times = sorted(path.stat().st_mtime for path in files)
    return (len(times) - 1) / (times[-1] - times[0])


# `generate` alone.


def alone(count: int, steps: int, options: Options, folder: Path) -> tuple[list[Path], float]:
    """`generate --requests` for so many; the videos, and the processor's seconds for all of it."""
    folder.mkdir()
    lines = folder / "requests.jsonl"
    for name in PICTURES.values():
        (folder / name).write_bytes((FOLDER / name).read_bytes())
    with lines.open("w") as file:
        for number in range(count):
            file.write(json.dumps({**scene(number % SCENES, steps), "name": str(number)}) + "\n")
    before = os.times()
    command = ["generate", "--requests", str(lines), "--bundle", options.bundle, "--quiet"]
    threads = ["--threads", str(options.threads)]
    subprocess.run([*PROGRAM, *command, *threads, "--output", str(folder / "{name}.mp4")], check=True)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return [folder / f"{number}.mp4" for number in range(count)], seconds


# A server.


class Server:
    """`conceptmaster serve` in a folder of its own."""

    def __init__(self, options: Options, folder: Path, nodes: Nodes | None = None, *more: str) -> None:
        self.folder, self.nodes = folder, nodes
        self.others = [] if nodes is None else [nodes.add(options.threads) for _ in range(options.nodes)]
        command = ["serve", "--bundle", options.bundle, "--port", "0", "--data", str(folder)]
        numbers = {"workers": options.workers, "threads": options.threads, "max-queue": 2 * options.clients}
        given = [word for name, value in numbers.items() for word in (f"--{name}", str(value))] + [*more]
        own = os.environ if nodes is None else nodes.environment
        if nodes is not None:
            given += ["--ray", nodes.address, "--workers", str(options.nodes)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([*PROGRAM, *command, *given], stdout=pipe, text=True, env=own)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[0]

    def workers(self) -> list[int]:
        """Process ids."""
        return below(self.process.pid) if self.nodes is None else self.nodes.workers(*self.others)

    def kill(self, dice: random.Random) -> str:
        """Kills something; what, "" where it was not there."""
        if self.nodes is None:
            found = {"worker": self.workers()}
        else:
            actors, gateway = self.nodes.actors(*self.others), below(self.process.pid)[:1]
            found = {"worker": self.workers(), "actor": actors, "node": self.others, "gateway": gateway}
        (what,) = dice.choices(list(found), SHARES[: len(found)])
        if not found[what]:
            return ""
        victim = dice.choice(found[what])
        if self.nodes is not None and what == "node":
            self.nodes.kill(victim)
            self.others = [node for node in self.others if node != victim] + [self.nodes.add()]
        else:
            os.kill(victim, signal.SIGKILL)
        return what

    def cpu(self) -> tuple[float, float]:
        """Seconds of the processor that it, and its workers, have had."""
        found = [0.0, 0.0]
        for place, pid in [(0, self.process.pid), *((1, pid) for pid in self.workers())]:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                found[place] += sum(map(int, fields[11:13])) / TICKS
        return found[0], found[1]

    def memory(self) -> tuple[int, int]:
        """Resident bytes of the server, and of its largest worker."""
        found = [0, 0]
        for place, pid in [(0, self.process.pid), *((1, pid) for pid in self.workers())]:
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                found[place] = max(found[place], pages * os.sysconf("SC_PAGE_SIZE"))
        return found[0], found[1]

    def videos(self) -> list[Path]:
        """Finished ones."""
        return list(self.folder.glob("videos/*/video-0.mp4"))

    def stop(self) -> None:
        """As a supervisor would."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0


class Load:
    """Clients, and what they found."""

    def __init__(self, server: Server, options: Options, right: list[str], steps: int, faults: bool) -> None:
        self.server, self.options, self.right = server, options, right
        self.steps, self.faults = steps, faults
        self.found: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.memory: list[tuple[int, int]] = []

    async def run(self, requests: range) -> None:
        """All of the requests."""
        numbers = iter(requests)
        limits = httpx.Limits(max_connections=self.options.clients)
        async with httpx.AsyncClient(
            base_url=self.server.url, timeout=PATIENCE, limits=limits, trust_env=False
        ) as http:
            aside = [asyncio.create_task(self._watch())]
            if self.faults:
                aside.append(asyncio.create_task(self._kill()))
            await asyncio.gather(*(self._client(http, numbers) for _ in range(self.options.clients)))
            for task in aside:
                task.cancel()

    async def _client(self, http: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        for number in numbers:
            self.found[await self._one(http, number)] += 1

    async def _one(self, http: httpx.AsyncClient, number: int) -> str:
        dice = random.Random(f"{self.options.seed} {number}")
        fate, patience = dice.random(), dice.uniform(0.0, 0.5 * self.options.clients)
        request = scene(number % SCENES, self.steps)
        parts: list[Any] = [(name, (None, str(request[name]))) for name in ("prompt", "seed", "steps")]
        for concept in request["concepts"]:
            parts.append(("label", (None, concept["label"])))
            parts.append(("input_reference", (concept["image"], (FOLDER / concept["image"]).read_bytes())))
        answer = await http.post("/v1/videos", files=parts)
        if answer.status_code != 200:
            return f"refused with {answer.status_code}"
        video = answer.json()
        place, begun = f"/v1/videos/{video['id']}", time.monotonic()
        while video["status"] in ("queued", "in_progress"):
            if self.faults and fate < CANCELLED + DELETED and time.monotonic() - begun > patience:
                if fate < DELETED:
                    deleted = await http.delete(place)
                    gone = (await http.get(place)).status_code == 404
                    return "deleted" if deleted.status_code == 200 and gone else "wrong"
                cancelled = (await http.post(f"{place}/cancel")).json()["status"]
                if cancelled == "cancelled":
                    return "cancelled" if (await http.get(place)).json()["status"] == "cancelled" else "wrong"
            pause = int(answer.headers["openai-poll-after-ms"]) / 1000
            await asyncio.sleep(min(pause, patience) if self.faults and fate < CANCELLED + DELETED else pause)
            answer = await http.get(place)
            if answer.status_code != 200:
                return "lost"
            video = answer.json()
        if video["status"] != "completed":
            return f"{video['status']}: {(video['error'] or {}).get('code')}"
        content = (await http.get(f"{place}/content")).content
        return "right" if hashlib.sha256(content).hexdigest() == self.right[number % SCENES] else "wrong"

    async def _kill(self) -> None:
        dice = random.Random(self.options.seed)
        between = 0.6 * self.options.requests / self.options.kills  # some take longer than that
        next_one = dice.uniform(0.5, 1.5) * between
        while self.kills.total() < self.options.kills:
            await asyncio.sleep(0.05)
            if self.found.total() < next_one:
                continue
            with contextlib.suppress(ProcessLookupError):
                if what := await asyncio.to_thread(self.server.kill, dice):
                    self.kills[what] += 1
                    next_one = max(next_one, self.found.total()) + dice.uniform(0.5, 1.5) * between

    async def _watch(self) -> None:
        while True:
            self.memory.append(self.server.memory())
            await asyncio.sleep(SAMPLE)


def waits(folder: Path) -> dict[str, Any]:
    """Seconds of finished videos, as the server wrote them down: until the first computation, and in all."""
    with contextlib.closing(sqlite3.connect(folder / "jobs.sqlite")) as database:
        rows = database.execute("select data from jobs where status = 'completed'").fetchall()
    jobs = [json.loads(row) for (row,) in rows]
    return {
        "queue_wait_s": _spread([job["started_at"] - job["created_at"] for job in jobs]),
        "latency_s": _spread([job["completed_at"] - job["created_at"] for job in jobs]),
        "left_unfinished": _count(folder, "status in ('queued', 'in_progress')"),
        "known": _count(folder, "1"),
    }


def _count(folder: Path, where: str) -> int:
    with contextlib.closing(sqlite3.connect(folder / "jobs.sqlite")) as database:
        return int(database.execute(f"select count(*) from jobs where {where}").fetchone()[0])


def _spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": round(statistics.median(values), 3), "p95": round(cuts[-1], 3)}


def _flat(memory: list[tuple[int, int]], which: int) -> dict[str, float]:
    """Megabytes: medians of the second quarter of the run, of its last, and the most."""
    values = [sample[which] / 1e6 for sample in memory if sample[which]]
    quarter = max(1, len(values) // 4)
    second, last = values[quarter : 2 * quarter] or values, values[-quarter:]
    most = round(max(values), 1)
    return {
        "second_quarter": round(statistics.median(second), 1),
        "last": round(statistics.median(last), 1),
        "most": most,
    }


def with_faults(options: Options, folder: Path) -> dict[str, Any]:
    """Cancels, deletes and killed workers."""
    right, _ = _right(options.steps, options, folder / "right")
    with Nodes(0) if options.nodes else contextlib.nullcontext() as nodes:
        return _with_faults(options, folder, right, nodes)


def _with_faults(options: Options, folder: Path, right: list[str], nodes: Nodes | None) -> dict[str, Any]:
    server = Server(options, folder / "server", nodes)
    try:
        load = Load(server, options, right, options.steps, True)
        start = time.perf_counter()
        asyncio.run(load.run(range(options.requests)))
        seconds = time.perf_counter() - start
        server.stop()
    finally:
        server.process.kill()
    return {
        "became": dict(sorted(load.found.items())),
        "kills": dict(sorted(load.kills.items())),
        **waits(server.folder),
        "memory_mb": {"server": _flat(load.memory, 0), "worker": _flat(load.memory, 1)},
        "seconds": round(seconds, 1),
    }


def without(options: Options, folder: Path) -> dict[str, Any]:
    """In turn with `generate` alone."""
    right, opening = _right(options.plain_steps, options, folder / "right")
    count, rows = options.plain // ROUNDS, []
    server = Server(options, folder / "server")
    try:
        load = Load(server, options, right, options.plain_steps, False)
        asyncio.run(load.run(range(SCENES)))  # so that all has been loaded
        for number in range(ROUNDS):
            videos, cpu = alone(count, options.plain_steps, options, folder / f"alone-{number}")
            known, before, own = set(server.videos()), server.cpu(), time.process_time()
            asyncio.run(load.run(range(number * count, (number + 1) * count)))
            after, own = server.cpu(), time.process_time() - own
            made = [path for path in server.videos() if path not in known]
            rows.append(
                {
                    "alone_per_s": rate(videos),
                    "served_per_s": rate(made),
                    "alone_cpu_s": (cpu - opening) / (count - SCENES),
                    "worker_cpu_s": (after[1] - before[1]) / count,
                    "server_cpu_s": (after[0] - before[0]) / count,
                    "clients_cpu_s": own / count,
                }
            )
            _say(rows[-1])
        server.stop()
    finally:
        server.process.kill()
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    alone_cpu, worker, http = (middle[f"{name}_cpu_s"] for name in ("alone", "worker", "server"))
    return {
        "became": dict(sorted(load.found.items())),
        **waits(server.folder),
        "rounds": [{name: round(value, 4) for name, value in row.items()} for row in rows],
        "median": {name: round(value, 4) for name, value in middle.items()},
        "throughput_against_alone": {
            "by_the_clock": round(statistics.median(r["served_per_s"] / r["alone_per_s"] for r in rows), 3),
            "by_the_workers_processor_time": round(alone_cpu / worker, 3),
            "by_all_processor_time": round(alone_cpu / (worker + http), 3),
        },
    }


def _right(steps: int, options: Options, folder: Path) -> tuple[list[str], float]:
    """SHA-256 of each scene's video, and the processor's seconds for all of it."""
    files, cpu = alone(SCENES, steps, options, folder)
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files], cpu


def _say(value: Any) -> None:
    print(json.dumps(value, indent=1), file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where something was lost or wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptmaster.benchmarks.serving", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--bundle", default="sprites")
    numbers = {"requests": 1000, "steps": 1, "plain": 200, "plain-steps": 4, "clients": 50, "workers": 1}
    numbers |= {"threads": 1, "seed": 0, "nodes": 0, "kills": 33}
    for option, default in numbers.items():
        parser.add_argument(f"--{option}", type=int, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the report goes, too")
    given = vars(parser.parse_args(argv))
    place = given.pop("write")
    options = Options(**given)
    report: dict[str, Any] = {
        "command": " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(PACKAGES),
        "options": dataclasses.asdict(options),
    }
    with tempfile.TemporaryDirectory() as name:
        for run, count, measure in (
            ("faults", options.requests, with_faults),
            ("plain", options.plain, without),
        ):
            if count:
                folder = Path(name) / run
                folder.mkdir()
                report[run] = measure(options, folder)
                _say(report[run])
    print(json.dumps(report, indent=1))
    if place is not None:
        write(report, place)
    runs = [report[run] for run in ("faults", "plain") if run in report]
    wrong = any(set(run["became"]) - {"right", "cancelled", "deleted"} for run in runs)
    return int(wrong or any(run["left_unfinished"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
