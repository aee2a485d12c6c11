"""Compressed token gaps against their brute-force expansion."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.report.quantiles import GapStatistics
from penstock.sim.result import TokenGaps
from penstock.workload.trace import F64

Row = tuple[float, float, int, int]


def gaps_of(rows: list[Row]) -> TokenGaps:
    return TokenGaps(
        np.array([r[0] for r in rows], np.float64),
        np.array([r[1] for r in rows], np.float64),
        np.array([r[2] for r in rows], np.int64),
        np.array([r[3] for r in rows], np.int64),
    )


def expand(rows: list[Row]) -> F64:
    parts = [np.repeat(first + np.arange(count) * rise, batch) for first, rise, count, batch in rows]
    return np.concatenate([np.empty(0), *parts])


first = st.one_of(st.sampled_from([0.0, 0.02, 0.03, 1.0]), st.floats(1e-4, 10.0))
rise = st.one_of(st.sampled_from([0.0, -0.0, 1e-3, -1e-5, 1e-20, -1e-17, 5e-324]), st.floats(-1e-2, 1e-2))
row = st.tuples(first, rise, st.integers(0, 40), st.integers(0, 5))


@settings(max_examples=250, deadline=None)
@given(st.lists(row, max_size=12), st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.99, 1.0]), st.floats(0, 1)))
@example([(1.0, 1e-17, 40, 3), (1.0, 0.0, 2, 1)], 0.5)
@example([(0.1, 0.1, 10, 1), (1.0, -0.1, 10, 1)], 0.95)
def test_equal_to_expansion(rows: list[Row], q: float) -> None:
    everything, statistics = expand(rows), GapStatistics(gaps_of(rows))
    assert statistics.total == len(everything)
    if not len(everything):
        assert statistics.quantile(q) is statistics.mean_s is statistics.max_s is None
        return
    assert statistics.quantile(q) == pytest.approx(float(np.quantile(everything, q)), rel=1e-13, abs=1e-15)
    assert statistics.mean_s == pytest.approx(float(everything.mean()), rel=1e-11, abs=1e-13)
    assert statistics.max_s == everything.max()


@settings(max_examples=15, deadline=None)
@given(st.lists(row, min_size=1, max_size=8))
def test_every_order_statistic_without_expanding(rows: list[Row]) -> None:
    """Bisection down to one float, with no help from writing gaps out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock.report.quantiles.EXPAND_AT_MOST", 0)
        statistics = GapStatistics(gaps_of(rows))
        for k, value in enumerate(np.sort(expand(rows))[:40].tolist()):
            assert statistics.smallest(k) == value


def test_a_quantile_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        GapStatistics(gaps_of([(1.0, 0.0, 1, 1)])).quantile(1.1)


def test_cost_does_not_depend_on_count() -> None:
    rng = np.random.default_rng(0)
    n = 200_000
    columns = (
        rng.gamma(9, 0.004, n),
        rng.uniform(-1e-9, 1e-6, n),
        rng.integers(1, 1_000_000, n),
        rng.integers(1, 200, n),
    )
    begin = time.perf_counter()
    statistics = GapStatistics(TokenGaps(*columns))
    assert statistics.quantile(0.5) is not None and statistics.quantile(0.99) is not None
    assert statistics.total > 1e12
    assert time.perf_counter() - begin < 5
