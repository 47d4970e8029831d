"""Differences and orders against SciPy 1.17's figures, and against what must be so."""

from __future__ import annotations

import numpy as np
import pytest

from conceptmaster.examples.sprites.paper.statistics import (
    Estimate,
    Scores,
    differences,
    drawn_means,
    interval,
    kendall,
    order,
)

PAPER = [0.623, 0.581, 0.546, 0.394, 0.277]


@pytest.mark.parametrize(
    ("ours", "tau"),
    [  # scipy.stats.kendalltau(PAPER, ours).statistic
        ([0.41, 0.47, 0.40, 0.12, 0.33], 0.6),
        ([0.3, 0.3, 0.2, 0.1, 0.1], 0.8944271909999159),
        ([1, 2, 3, 4, 5], -1.0),
    ],
)
def test_kendalls_tau_is_scipys(ours, tau):
    assert kendall(PAPER, ours) == pytest.approx(tau, abs=1e-12)
    assert kendall(PAPER, np.array([ours, PAPER])) == pytest.approx([tau, 1.0], abs=1e-12)


def one_difference(first: Scores, second: Scores) -> Estimate:
    return differences({"first": first, "second": second}, [("first", "second")])["first", "second"]


def test_an_order_of_equals_is_none():
    assert np.isnan(kendall(PAPER, [0.5] * 5))


def test_a_paired_difference_is_scipys():
    rng = np.random.default_rng(7)
    first = rng.normal(0.5, 0.2, (1, 200))
    second = first + rng.normal(0.03, 0.1, (1, 200))
    found = one_difference(second, first)
    # scipy.stats.bootstrap(paired=True, method="percentile", n_resamples=20000) of the mean difference
    assert found.value == pytest.approx(0.022049422892353877)
    assert (found.low, found.high) == pytest.approx((0.00845, 0.03543), abs=8e-4)
    assert found.separates
    unpaired = first.std() / 200**0.5 * 1.96  # what pairing saves: either mean alone is less sure than that
    assert unpaired > 1.5 * (found.high - found.low) / 2


def test_seeds_count_as_new_trainings_would():
    """Requests that agree leave the seeds alone: the mean's standard error is s / sqrt(S), s with S - 1."""
    each = np.array([0.1, 0.2, 0.6])
    drawn = drawn_means({"a": np.repeat(each[:, None], 50, 1)}, draws=100_000)["a"]
    assert drawn.mean() == pytest.approx(0.3, abs=2e-3)
    assert drawn.std() == pytest.approx(each.std(ddof=1) / 3**0.5, rel=0.01)


def test_several_comparisons_widen_each_interval():
    rng = np.random.default_rng(1)
    rows = {name: rng.normal(0.5, 0.2, (3, 100)) for name in ("ours", "a", "b", "c", "d")}
    pairs = [("ours", "a"), ("ours", "b"), ("ours", "c"), ("d", "c")]
    alone = one_difference(rows["ours"], rows["a"])
    among = differences(rows, pairs)[pairs[0]]
    assert among.value == alone.value and among.low < alone.low and among.high > alone.high


def test_a_row_of_fewer_requests_is_compared_on_those():
    ours, other = np.linspace(0, 1, 200)[None], np.zeros((1, 32))
    assert one_difference(ours, other).value == pytest.approx(ours[:, :32].mean())
    assert one_difference(other, ours).value == -one_difference(ours, other).value


def test_an_order_is_as_sure_as_its_rows():
    rng = np.random.default_rng(2)
    paper = dict(zip("abcde", PAPER, strict=True))
    clear = {name: rng.normal(value, 0.01, (3, 200)) for name, value in paper.items()}
    blurred = {name: rng.normal(0.5, 0.3, (3, 200)) for name in paper}
    assert order(clear, paper) == Estimate(1.0, 1.0, 1.0)
    unsure = order(blurred, paper)
    assert unsure.low < 0 < unsure.high


def test_an_interval_holds_what_was_drawn():
    assert interval(0.5, np.linspace(0, 1, 1001), 0.9) == Estimate(
        0.5, pytest.approx(0.05), pytest.approx(0.95)
    )
