"""The simulated cluster, against what is known without it: who waits how long follows from the arrivals alone
where nothing fails, and nothing is lost where much does."""

from __future__ import annotations

import heapq
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")

from conceptmaster.benchmarks import cluster_simulation as simulation  # noqa: E402
from conceptmaster.benchmarks.cluster_simulation import Arrival, Kind, Scenario  # noqa: E402

SAME = Kind("same", 1.0, 2, 20.0, 20.0)  # a minute
ONE, TWO, LONG = (
    Kind("one", 0.8, 4, 4.0, 4.0),
    Kind("two", 0.15, 3, 20.0, 5.0),
    Kind("two", 0.05, 6, 20.0, 5.0),
)


@pytest.fixture(autouse=True)
def mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "MIXES", {"many": (ONE, TWO, LONG)})
    if Path("/dev/shm").is_dir():  # every job is synced, which a disk takes its time for
        monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")


def beginnings(came: Sequence[Arrival], workers: int) -> list[float]:
    """When each begins, where the first that waits gets the first worker that is free."""
    free, found = [0.0] * workers, []
    for arrival in came:
        found.append(max(arrival.time, heapq.heappop(free)))
        heapq.heappush(free, found[-1] + sum(arrival.timings))
    return found


def test_jobs_begin_when_the_first_free_worker_would_take_them():
    came = simulation.arrivals([SAME], 0.9 * 8 / SAME.seconds, 3600.0, "0")
    seen = simulation.run(came, {"same": 8}, math.inf, 0)
    assert [seen.watch.began[a.id] for a in came] == pytest.approx(beginnings(came, 8), abs=1e-6)
    assert seen.became == {"completed": len(came)} and len(came) > 300


def test_jobs_wait_as_the_formula_says(monkeypatch):
    """docs/serving.md, How many workers."""
    monkeypatch.setattr(simulation, "SPREAD", 0.0)
    for workers, load in ((1, 0.5), (1, 0.8), (8, 0.8)):
        came = simulation.arrivals([SAME], load * workers / SAME.seconds, 3e6 / workers, "0")
        waits = [begin - a.time for a, begin in zip(came, beginnings(came, workers), strict=True)]
        formula = SAME.seconds / (2 * workers) * load ** (math.sqrt(2 * (workers + 1)) - 1) / (1 - load)
        assert sum(waits) / len(waits) == pytest.approx(formula, rel=0.1)


def test_a_seed_gives_the_same_queue_and_nothing_is_lost_when_nodes_die():
    scenario = Scenario("many", 16, 0.6, mtbf=2.0, hours=0.5)
    one, same, other = (
        simulation.simulate(s)["queue"]
        for s in (scenario, scenario, Scenario("many", 16, 0.6, seed=1, hours=0.2))
    )
    assert one == same and one["wait_s"] != other["wait_s"]
    assert one["lost"] == 0 and one["failures_of_nodes"] > 0 and one["hangs"] > 0 and one["broken_off"] > 8
    assert sum(one["became"].values()) == one["jobs"] > 250


def test_heads_by_bundle_change_no_waiting_and_copies_do():
    one, parted, copies = (
        simulation.simulate(Scenario("many", 16, 0.9, heads=heads, hours=0.3))["queue"]
        for heads in ("one", "by-bundle", "copies")
    )
    assert one["jobs"] == parted["jobs"] > 300 and one["wait_s"]["p95"] > 0
    assert list(parted["wait_s"].values()) == pytest.approx(list(one["wait_s"].values()), abs=2e-3)
    assert copies["wait_s"]["mean"] > 1.5 * one["wait_s"]["mean"]
