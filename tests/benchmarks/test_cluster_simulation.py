"""The simulated cluster, against what is known without it: who waits how long follows from the arrivals alone
where nothing fails, and nothing is lost where much does."""

from __future__ import annotations

import heapq
import math

import pytest

pytest.importorskip("prometheus_client")

from conceptmaster.benchmarks import cluster_simulation as simulation  # noqa: E402
from conceptmaster.benchmarks.cluster_simulation import Kind, Scenario  # noqa: E402

SAME = Kind("same", 1.0, 2, 20.0, 20.0)  # a minute


@pytest.fixture(autouse=True)
def mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    many = (Kind("one", 0.6, 4, 1.0, 2.0), Kind("two", 0.3, 3, 20.0, 5.0), Kind("two", 0.1, 6, 20.0, 5.0))
    monkeypatch.setattr(simulation, "MIXES", {"same": (SAME,), "many": many})


def test_jobs_wait_as_long_as_whoever_takes_the_first_free_worker_would(monkeypatch):
    monkeypatch.setattr(simulation, "SPREAD", 0.0)
    workers, load = 8, 0.8
    came = simulation.arrivals([SAME], load * workers / SAME.seconds, 3600.0 * 7, "0")
    seen = simulation.run(came, {"same": workers}, math.inf, 0)
    free, waits = [0.0] * workers, []
    for arrival in came:
        begin = max(arrival.time, heapq.heappop(free))
        heapq.heappush(free, begin + SAME.seconds)
        waits.append(begin - arrival.time)
        assert seen.watch.began[arrival.id] == pytest.approx(begin, abs=1e-6)
        assert seen.watch.ended[arrival.id] == pytest.approx(begin + SAME.seconds, abs=1e-6)
    assert seen.became == {"completed": len(came)}
    formula = SAME.seconds / (2 * workers) * load ** (math.sqrt(2 * (workers + 1)) - 1) / (1 - load)
    assert sum(waits) / len(waits) == pytest.approx(formula, rel=0.2)  # docs/serving.md, How many workers


def test_a_seed_gives_the_same_queue_and_nothing_is_lost_when_nodes_die():
    scenario = Scenario("many", 40, 0.8, mtbf=8.0, hours=1.5)
    one, same, other = (
        simulation.simulate(s)["queue"]
        for s in (scenario, scenario, Scenario("many", 40, 0.8, 8.0, hours=1.5, seed=1))
    )
    assert one == same and one != other
    assert one["lost"] == 0 and one["failures_of_nodes"] > 3 and one["made_again"] > 10
    assert sum(one["became"].values()) == one["jobs"] > 1000


def test_heads_by_bundle_change_no_waiting_and_copies_do():
    one, parted, copies = (
        simulation.simulate(Scenario("many", 40, 0.9, heads=heads, hours=2.0))
        for heads in ("one", "by-bundle", "copies")
    )
    assert one["queue"]["jobs"] == parted["queue"]["jobs"]
    for figure in ("p50", "p95", "mean"):
        assert one["queue"]["wait_s"][figure] == pytest.approx(parted["queue"]["wait_s"][figure], abs=0.1)
    assert copies["queue"]["wait_s"]["mean"] > 1.5 * one["queue"]["wait_s"]["mean"]
