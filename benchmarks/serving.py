"""A server under load: is anything lost or wrong, what does it wait, what does it cost? No GPU is needed.

    python -m conceptmaster.benchmarks.serving [--write] [--requests N] [--clients N] [--steps N] …

First the requests' videos are made by `conceptmaster generate --requests`: what is right, and how fast it is
alone. Then so many clients ask a server for them, poll as OpenAI's client does, cancel and delete some, and
download and compare the rest, while workers are killed now and then (SIGKILL); all of it by one seed, but for
the moments. Then others (--plain), without any of that: throughput against `generate` alone, as videos by the
clock, and as processor time, which tells more on a machine that others use, too. The clients' own time counts
as the machine's. `--write` also writes benchmarks/results/serving.json.
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

from .reports import RESULTS, ROOT, commit, machine, write

REPORT = RESULTS / "serving.json"
PICTURES = {"flower": "1.png", "rocket": "2.png"}
FOLDER = ROOT / "examples/sprites/requests/first"
SCENES = 12
CANCELLED, DELETED = 0.08, 0.04  # of the requests
BETWEEN_KILLS = (15, 45)  # videos
SAMPLE = 1.0  # seconds between two looks at the memory
PATIENCE = 600.0
TICKS = os.sysconf("SC_CLK_TCK")
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

    def __init__(self, options: Options, folder: Path) -> None:
        self.folder = folder
        command = ["serve", "--bundle", options.bundle, "--port", "0", "--data", str(folder)]
        numbers = {"workers": options.workers, "threads": options.threads, "max-queue": 2 * options.clients}
        given = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
        self.process = subprocess.Popen([*PROGRAM, *command, *given], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[0]

    def workers(self) -> list[int]:
        """Process ids."""
        pid = self.process.pid
        tasks = Path(f"/proc/{pid}/task")
        return [int(w) for task in tasks.iterdir() for w in (task / "children").read_text().split()]

    def cpu(self) -> float:
        """Seconds of the processor that it and its workers have had, those that were waited for, too."""
        total = 0.0
        for pid in (self.process.pid, *self.workers()):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15])) / TICKS
        return total

    def memory(self) -> tuple[int, int]:
        """Resident bytes of the server, and of its largest worker."""
        found = [0, 0]
        for place, pid in [(0, self.process.pid), *((1, pid) for pid in self.workers())]:
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                found[place] = max(found[place], pages * os.sysconf("SC_PAGE_SIZE"))
        return found[0], found[1]

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
        self.kills = 0
        self.memory: list[tuple[int, int]] = []

    async def run(self, count: int) -> None:
        """All of the requests."""
        numbers = iter(range(count))
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
        next_one = dice.randint(*BETWEEN_KILLS)
        while True:
            await asyncio.sleep(0.05)
            workers = self.server.workers()
            if sum(self.found.values()) >= next_one and workers:
                os.kill(dice.choice(workers), signal.SIGKILL)
                self.kills += 1
                next_one += dice.randint(*BETWEEN_KILLS)

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


def loaded(options: Options, folder: Path, right: list[str], faults: bool) -> dict[str, Any]:
    """One run against a fresh server."""
    count, steps = (options.requests, options.steps) if faults else (options.plain, options.plain_steps)
    server = Server(options, folder)
    try:
        load = Load(server, options, right, steps, faults)
        before, own, start = server.cpu(), time.process_time(), time.perf_counter()
        asyncio.run(load.run(count))
        seconds, cpu, own = time.perf_counter() - start, server.cpu() - before, time.process_time() - own
        videos = [path for path in folder.glob("videos/*/video-0.mp4")]
        speed = rate(videos)
        server.stop()
    finally:
        server.process.kill()
    return {
        "requests": count,
        "became": dict(sorted(load.found.items())),
        "worker_kills": load.kills,
        **waits(folder),
        "memory_mb": {"server": _flat(load.memory, 0), "worker": _flat(load.memory, 1)},
        "seconds": round(seconds, 1),
        "videos_per_second": round(speed, 4),
        "server_cpu_s_per_video": round(cpu / len(videos), 4),
        "clients_cpu_s_per_video": round(own / len(videos), 4),
    }


def _right(steps: int, options: Options, folder: Path) -> tuple[list[str], float]:
    """SHA-256 of each scene's video, and the processor's seconds for all of it."""
    files, cpu = alone(SCENES, steps, options, folder)
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files], cpu


def measured(options: Options) -> dict[str, Any]:
    """The whole report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        right, opening = _right(options.steps, options, folder / "right")
        report: dict[str, Any] = {"faults": loaded(options, folder / "faults", right, True)}
        _say(report)
        right, opening = _right(options.plain_steps, options, folder / "plain-right")
        halves = []  # before and behind the server's run: a machine that others use is not always as fast
        for half in ("before", "behind"):
            if half == "behind":
                report["plain"] = loaded(options, folder / "plain", right, False)
            videos, cpu = alone(options.plain // 2, options.plain_steps, options, folder / half)
            halves.append((rate(videos), (cpu - opening) / (len(videos) - SCENES)))
    speed, cpu = (statistics.mean(half[i] for half in halves) for i in (0, 1))
    report["generate_alone"] = {"videos_per_second": round(speed, 4), "cpu_s_per_video": round(cpu, 4)}
    plain = report["plain"]
    report["throughput_ratio"] = {
        "by_the_clock": round(plain["videos_per_second"] / speed, 3),
        "by_processor_time": round(cpu / plain["server_cpu_s_per_video"], 3),
    }
    return report


def _say(value: Any) -> None:
    print(json.dumps(value, indent=1), file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where something was lost or wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptmaster.benchmarks.serving", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--bundle", default="sprites")
    numbers = {"requests": 1000, "steps": 1, "plain": 200, "plain-steps": 4, "clients": 50}
    for option, default in {**numbers, "workers": 1, "threads": 1, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--write", action="store_true", help=f"also write {REPORT.relative_to(ROOT)}")
    given = vars(parser.parse_args(argv))
    writing = given.pop("write")
    options = Options(**given)
    about = {
        "command": " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(("numpy", "onnxruntime", "fastapi", "starlette", "uvicorn", "sse-starlette")),
        "options": dataclasses.asdict(options),
    }
    report = {**about, **measured(options)}
    print(json.dumps(report, indent=1))
    if writing:
        write(report, REPORT)
    wrong = [set(report[run]["became"]) - {"right", "cancelled", "deleted"} for run in ("faults", "plain")]
    return int(any(wrong) or any(report[run]["left_unfinished"] for run in ("faults", "plain")))


if __name__ == "__main__":
    sys.exit(main())
