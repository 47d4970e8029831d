"""SIMULATED: the queue at up to 1,000 GPUs, with failures and jobs of several sizes. No GPU is needed.

    python -m conceptmaster.benchmarks.cluster_simulation [--gpus N …] [--mix NAME …] … [--write FILE]

The server's own queue, jobs in SQLite, folders and ends of Ray workers run in a loop whose clock jumps to the
next timer (virtual_clock.py), over a cluster that only waits (simulated_cluster.py). So what jobs wait is
simulated, and the same for the same seed; what the head's processor takes for a job is measured, on this
machine: without HTTP, without the process that speaks with Ray, and with a timer of the loop in the place of
reading each line that a worker says. Waiting does not know of that time: where `head_busy` comes near 1, the
head is what jobs would wait for. Without options for what to run, all of SUITE.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import dataclasses
import heapq
import itertools
import json
import math
import pstats
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptmaster.runtime.server.dispatcher import Dispatcher
from conceptmaster.runtime.server.folder import Folder
from conceptmaster.runtime.server.jobs import Job, Store
from conceptmaster.runtime.server.measures import Measures

from .reports import commit, machine, write
from .simulated_cluster import GPUS, HANGS, LOADING, NOTICED, REPAIR, Watch, cluster
from .virtual_clock import EPOCH, virtual_time

JOBS = 4_000  # of a run whose hours are not given
SPREAD = 0.05  # a job's seconds are this much longer or shorter, at most
OPEN = 2 * LOADING + 1.0  # when jobs begin to come: a bundle's first worker loads alone
WARM_UP = 3.0  # times the longest job that is not counted from then on, until the GPUs are as busy as always
KEEP = 60.0  # seconds until files go, so that deleting them is in the head's time


@dataclass(frozen=True)
class Kind:
    """Jobs of one size. share: of the requests; around: seconds beside the steps."""

    bundle: str
    share: float
    steps: int
    step: float
    around: float

    @property
    def seconds(self) -> float:
        """Of one job."""
        return self.steps * self.step + self.around


# Seconds of one H200 at 832x480x81 (docs/performance.md; benchmarks/results/gpu.json): a forward of the 1.3B
# 0.494, a step of two branches of the 14B 5.72, all stages around it 2.84 (measured beside the 1.3B; taken
# for the 14B, too). Each was measured alone, no whole video was. Steps and shares are chosen.
FEW = Kind("few-step-1.3b", 1.0, 4, 0.494, 2.84)
LARGE = (("14b", 0.3, 20), ("14b", 0.5, 50), ("14b", 0.2, 80))
MIXES = {
    "few-step": (FEW,),
    "14b": tuple(Kind(*kind, 5.72, 2.84) for kind in LARGE),
    "both": (
        dataclasses.replace(FEW, share=0.8),
        *(Kind(bundle, 0.2 * share, steps, 5.72, 2.84) for bundle, share, steps in LARGE),
    ),
    "four-few-step": tuple(dataclasses.replace(FEW, bundle=f"few-step-{n}", share=0.25) for n in range(4)),
}


@dataclass(frozen=True)
class Scenario:
    """load: the share of the GPUs' time that is asked for; mtbf: hours between two failures of one GPU;
    heads: `one`, `by-bundle`, or `copies`: as many, each with the same share of every bundle's GPUs."""

    mix: str
    gpus: int
    load: float = 0.7
    mtbf: float = math.inf
    heads: str = "one"
    hours: float | None = None
    seed: int = 0


COPIES = 4  # heads that are copies
SUITE = (
    *(Scenario("few-step", gpus, load) for gpus in (8, 100, 1000) for load in (0.7, 0.9)),
    *(Scenario("four-few-step", 1000, 0.9, heads=heads) for heads in ("one", "by-bundle", "copies")),
    Scenario("14b", 100, 0.9),
    Scenario("both", 100, 0.9),
    Scenario("14b", 1000, 0.9),
    Scenario("14b", 1000, 0.9, mtbf=100.0, hours=1.0),
)


@dataclass(frozen=True)
class Arrival:
    """A job that comes at a time of the loop. timings: see SimulatedGateway."""

    time: float
    id: str
    bundle: str
    timings: tuple[float, ...]


def arrivals(kinds: Sequence[Kind], rate: float, end: float, seed: str) -> list[Arrival]:
    """At random, so many a second until `end`, in order."""

    def of_kind(number: int, kind: Kind) -> Iterator[Arrival]:
        dice = random.Random(f"{seed} {kind.bundle} {number}")
        time = OPEN
        for count in itertools.count():
            time += dice.expovariate(rate * kind.share)
            if time > end:
                return
            longer = dice.uniform(1 - SPREAD, 1 + SPREAD)
            timings = (*[longer * kind.step] * kind.steps, longer * kind.around)
            yield Arrival(time, f"video_{number}_{count}", kind.bundle, timings)

    each = (of_kind(number, kind) for number, kind in enumerate(kinds))
    return list(heapq.merge(*each, key=lambda arrival: arrival.time))


class Counted(Measures):
    """The server's own, and how many jobs ended as what."""

    def __init__(self) -> None:
        super().__init__()
        self.became: Counter[str] = Counter()

    def ended(self, status: str) -> None:
        """See Measures."""
        self.became[status] += 1
        super().ended(status)


@dataclass(frozen=True)
class Run:
    """What one head saw. became: jobs by how they ended; warm, end: the seconds of the loop between which
    things are counted; spent: the processor's seconds of the head between them, for so many jobs."""

    came: list[Arrival]
    watch: Watch
    became: Counter[str]
    warm: float
    end: float
    spent: float
    jobs: int


def run(came: list[Arrival], gpus: dict[str, int], mtbf: float, seed: int, warm: float = OPEN) -> Run:
    """One head with so many GPUs for each bundle, until all that came has ended. mtbf: in hours; warm: when
    counting begins."""
    with (
        tempfile.TemporaryDirectory() as name,
        virtual_time("conceptmaster.runtime.server", "conceptmaster.runtime.workers") as loop,
        Folder(Path(name)) as folder,
    ):
        store = Store(folder.database)
        try:
            return loop.run_until_complete(_run(came, gpus, mtbf * 3600.0, seed, warm, store, folder))
        finally:
            store.close()


async def _run(
    came: list[Arrival],
    gpus: dict[str, int],
    mtbf: float,
    seed: int,
    warm: float,
    store: Store,
    folder: Folder,
) -> Run:
    loop, watch, measures = asyncio.get_running_loop(), Watch(), Counted()
    timings = {arrival.id: arrival.timings for arrival in came}
    workers, nodes = cluster(gpus, timings, mtbf, seed, watch)
    dispatcher = Dispatcher(store, folder, workers, measures, most=10**9, keep=KEEP)
    await dispatcher.start()
    failing = [asyncio.create_task(node.fail()) for node in nodes if mtbf < math.inf]
    begun, before = 0.0, 0
    for arrival in came:
        if arrival.time > loop.time():
            await asyncio.sleep(arrival.time - loop.time())
        if not begun and arrival.time >= warm:
            begun, before, watch.own = time.thread_time(), len(watch.ended), 0.0
        await dispatcher.submit(_job(arrival, watch))
    spent, jobs, end = time.thread_time() - begun - watch.own, len(watch.ended) - before, loop.time()
    while store.active():
        await asyncio.sleep(1.0)
    for task in failing:
        task.cancel()
    await dispatcher.drain(0.0)
    return Run(came, watch, measures.became, warm, end, spent, jobs)


def _job(arrival: Arrival, watch: Watch) -> Job:
    own = time.thread_time()
    concepts = [{"label": label, "sha256": digest * 64} for label, digest in (("cat", "a"), ("car", "b"))]
    request = {"prompt": "a cat beside a red car", "concepts": concepts, "seed": 0, "samples": 1}
    job = Job(arrival.id, "", arrival.bundle, request, "", EPOCH + arrival.time)
    watch.own += time.thread_time() - own
    return job


def shares(kinds: Sequence[Kind], gpus: int) -> dict[str, int]:
    """GPUs of each bundle, by the work that is asked of it."""
    work = dict.fromkeys((kind.bundle for kind in kinds), 0.0)
    for kind in kinds:
        work[kind.bundle] += kind.share * kind.seconds
    first, *others = work
    found = {bundle: round(gpus * work[bundle] / sum(work.values())) for bundle in others}
    return {first: gpus - sum(found.values())} | found


def simulate(scenario: Scenario) -> dict[str, Any]:
    """One row of the report. Heads that share nothing are run one after the other."""
    kinds, runs = MIXES[scenario.mix], []
    mean = sum(kind.share * kind.seconds for kind in kinds)
    rate = scenario.load * scenario.gpus / mean
    hours = JOBS / rate / 3600.0 if scenario.hours is None else scenario.hours
    warm, seed = OPEN + WARM_UP * max(kind.seconds for kind in kinds), scenario.seed
    end = warm + 3600.0 * hours
    every = shares(kinds, scenario.gpus)
    if scenario.heads == "copies":
        own = {bundle: count // COPIES for bundle, count in every.items()}
        for copy in range(COPIES):
            came = arrivals(kinds, rate / COPIES, end, f"{seed} {copy}")
            runs.append(run(came, own, scenario.mtbf, seed + copy, warm))
    else:
        came = arrivals(kinds, rate, end, str(seed))
        groups = [every] if scenario.heads == "one" else [{bundle: n} for bundle, n in every.items()]
        for group in groups:
            runs.append(run([a for a in came if a.bundle in group], group, scenario.mtbf, seed, warm))
    return {
        "simulated": True,
        **dataclasses.asdict(scenario),
        "hours": round(hours, 3),
        "mtbf": None if math.isinf(scenario.mtbf) else scenario.mtbf,
        "jobs_per_s": round(rate, 3),
        "queue": queue_figures(runs, scenario.gpus),
        "measured": head_figures(runs),
    }


def queue_figures(runs: Sequence[Run], gpus: int) -> dict[str, Any]:
    """What is the same for the same seed: seconds that jobs waited for their first beginning, and took in
    all; the share of the GPUs' time that went into jobs which were made; what became of them."""
    waits, latencies, work, seconds = [], [], 0.0, 0.0
    for run in runs:
        for arrival in run.came:
            ended = run.watch.ended.get(arrival.id)
            if arrival.time >= run.warm and ended is not None:
                waits.append(run.watch.began[arrival.id] - arrival.time)
                latencies.append(ended - arrival.time)
            if ended is not None and run.warm <= ended <= run.end:
                work += sum(arrival.timings)
        seconds = max(seconds, run.end - run.warm)
    became = sum((run.became for run in runs), Counter[str]())
    made = sum(len(run.watch.ended) for run in runs)
    return {
        "jobs": sum(len(run.came) for run in runs),
        "became": dict(sorted(became.items())),
        "lost": sum(len(run.came) for run in runs) - made - became["failed"],
        "failures_of_nodes": sum(run.watch.failures for run in runs),
        "hangs": sum(run.watch.hangs for run in runs),
        "broken_off": sum(run.watch.broken_off for run in runs),
        "wait_s": _spread(waits),
        "latency_s": _spread(latencies),
        "utilisation": round(work / (gpus * seconds), 4),
    }


def head_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """What the head's processor took here; of several heads, the busiest."""
    spent, jobs = sum(run.spent for run in runs), sum(run.jobs for run in runs)
    return {
        "cpu_ms_per_job": round(1000 * spent / jobs, 3),
        "head_busy": round(max(run.spent / (run.end - run.warm) for run in runs), 4),
        "jobs_per_s_of_one_core": round(jobs / spent, 1),
    }


def _spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    found = {"mean": statistics.fmean(values), "p50": statistics.median(values), "p95": cuts[-1]}
    return {name: round(value, 3) for name, value in found.items()}


def chosen(given: argparse.Namespace) -> list[Scenario]:
    """Every combination of what was asked for; SUITE where nothing was."""
    names = ("mix", "gpus", "load", "mtbf", "heads")
    asked: dict[str, list[Any]] = {name: getattr(given, name) for name in names if getattr(given, name)}
    if not asked:
        return [dataclasses.replace(s, seed=given.seed, hours=given.hours or s.hours) for s in SUITE]
    asked = {"mix": ["few-step"], "gpus": [1000], **asked}
    every = (dict(zip(asked, values, strict=True)) for values in itertools.product(*asked.values()))
    return [Scenario(**values, hours=given.hours, seed=given.seed) for values in every]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a job was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptmaster.benchmarks.cluster_simulation", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--mix", nargs="+", choices=MIXES, help="kinds of jobs (few-step)")
    parser.add_argument("--gpus", nargs="+", type=int, metavar="N", help="(1000)")
    parser.add_argument("--load", nargs="+", type=float, metavar="SHARE", help="of the GPUs' time (0.7)")
    parser.add_argument("--mtbf", nargs="+", type=float, metavar="HOURS", help="of a GPU (inf)")
    parser.add_argument("--heads", nargs="+", choices=("one", "by-bundle", "copies"), help="(one)")
    parser.add_argument("--hours", type=float, metavar="H", help=f"simulated (until {JOBS} jobs have come)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(0)")
    parser.add_argument("--profile", action="store_true", help="print where the processor's time goes")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the report goes, too")
    given = parser.parse_args(argv)
    report: dict[str, Any] = {
        "simulated": "the cluster is; only what is called `measured` is of the machine below",
        "command": " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(()),
        "chosen": {
            "gpus_of_a_node": GPUS,
            "loading_s": LOADING,
            "repair_s": REPAIR,
            "noticed_s": NOTICED,
            "hangs": HANGS,
            "keep_s": KEEP,
        },
        "mixes": {
            name: [{**dataclasses.asdict(kind), "seconds": round(kind.seconds, 2)} for kind in kinds]
            for name, kinds in MIXES.items()
        },
        "rows": [],
    }
    profile = cProfile.Profile(time.thread_time) if given.profile else None
    for scenario in chosen(given):
        with profile or contextlib.nullcontext():
            row = simulate(scenario)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    if given.write is not None:
        write(report, given.write)
    return int(any(row["queue"]["lost"] for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
