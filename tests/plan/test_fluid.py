"""WAIT's fluid model against worked vectors, and what must hold for any types (arXiv 2504.11320)."""

from __future__ import annotations

from math import inf, isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.plan.fluid import (
    Curve,
    Flow,
    StepCost,
    batch_seconds,
    curve,
    judge,
    memory_of,
    nested_cap,
    require_room,
    segment_ends,
    shared_cap,
    solve,
    whole_thresholds,
)

COST = StepCost(0.010, 1e-6)
BUSY = (Flow(10, 10, 1000.0), Flow(10, 20, 1000.0))
CALM = (Flow(10, 10, 100.0), Flow(10, 20, 100.0))
LMSYS = Curve(298.84, 0.0113071)
LMSYS_CAPACITY = 1.37e5


def test_the_worked_vector() -> None:
    assert [flow.held() for flow in BUSY] == [165.0, 420.0]
    found = solve(BUSY, COST)
    assert found.demand == 585_000.0
    assert round(found.memory_tokens, 1) == 14_096.4
    assert round(1e3 * found.step_s, 3) == 24.096
    assert [round(n, 3) for n in found.starts] == [24.096, 24.096]
    assert found.tokens_per_s == 30_000.0


def test_a_tenth_of_the_rate() -> None:
    found = solve(CALM, COST)
    assert round(found.memory_tokens, 2) == 621.35
    assert round(1e3 * found.step_s, 3) == 10.621


def test_whole_thresholds_and_what_rounding_costs() -> None:
    found = judge(BUSY, COST, (26, 26), 16_000)
    assert found.memory_tokens == 15_210.0 and found.keeps_up and found.fits
    assert round(1e3 * found.batch_s, 2) == 25.21 and found.gather_s == pytest.approx(0.026)
    assert not judge(BUSY, COST, (24, 24)).keeps_up
    assert not judge(BUSY, COST, (26, 26), 15_000).fits
    large = judge(CALM, COST, (3, 3))
    assert large.memory_tokens == 1755.0 and large.keeps_up and round(large.over, 2) == 2.82
    assert whole_thresholds(BUSY, COST) == (26, 26)
    assert whole_thresholds(BUSY, COST, margin=0.0) == (25, 25)
    assert whole_thresholds(CALM, COST, margin=0.0) == (2, 2)  # n* is 1.06, but one a step would not keep up


def test_memory_over_the_rate() -> None:
    """The published table; a and b have five and six digits, which M* near its pole feels most."""
    for rate, memory in ((50, 34_377), (60, 55_758), (70, 100_327), (80, 250_509)):
        assert LMSYS.memory_tokens(rate) == pytest.approx(memory, rel=3e-5)
    assert round(LMSYS.rate_at(LMSYS_CAPACITY), 2) == 74.14
    assert round(LMSYS.pole_rps(), 2) == 88.44
    assert LMSYS.memory_tokens(LMSYS.pole_rps() + 1) == inf


def test_two_rows_of_the_published_table_give_the_others() -> None:
    """1 / M* = 1 / (a rate) - b / a: the outer rows fix a and b, and the form must then meet the inner ones."""
    slope, offset = _line(50.0, 34_377.0, 80.0, 250_509.0)
    through = Curve(1.0 / slope, -offset / slope)
    assert round(through.memory_tokens(60.0)) == pytest.approx(55_758, abs=1)
    assert round(through.memory_tokens(70.0)) == pytest.approx(100_327, abs=2)


def _line(rate_a: float, memory_a: float, rate_b: float, memory_b: float) -> tuple[float, float]:
    slope = (1 / memory_a - 1 / memory_b) / (1 / rate_a - 1 / rate_b)
    return slope, 1 / memory_a - slope / rate_a


def test_the_curve_is_the_equilibrium_at_every_rate() -> None:
    over = curve(BUSY, COST)
    for flows in (BUSY, CALM):
        total = sum(flow.rate_rps for flow in flows)
        assert over.memory_tokens(total) == pytest.approx(solve(flows, COST).memory_tokens)
    assert over.memory_tokens(over.rate_at(9999.0)) == pytest.approx(9999.0)


def test_unstable_and_overfull_are_told_apart() -> None:
    twice = [Flow(flow.prompt, flow.output, 2 * flow.rate_rps) for flow in BUSY]
    with pytest.raises(PenstockError, match=r"unstable: 4000 requests/s need 1\.17 .*stay below 3419 requests/s"):
        solve(twice, COST)
    with pytest.raises(PenstockError, match=r"overfull: .*14,096\.4 KV tokens, the cache 14,000: stay below 1994"):
        require_room(solve(BUSY, COST), BUSY, COST, 14_000)
    require_room(solve(BUSY, COST), BUSY, COST, 14_097)
    with pytest.raises(PenstockError, match="leaves no margin"):
        whole_thresholds(BUSY, COST, margin=0.8)


def test_practical_rules() -> None:
    """v1: n_j (output_j + 1) adds up to the cap. Revised: 30 requests in segments 1-20 and 21-50 are 21 and 9."""
    found = shared_cap(BUSY, 832)
    assert found == pytest.approx((26.0, 26.0))
    segments = nested_cap([0.3], [20, 30], 30, eta=0.0)
    assert [round(n * length) for n, length in zip(segments, (20, 30), strict=True)] == [21, 9]
    assert nested_cap([0.97], [10, 10], 20)[1] / nested_cap([0.97], [10, 10], 20)[0] == pytest.approx(0.99)
    assert segment_ends(500, 3) == (167, 333, 500)
    assert segment_ends(2, 5) == (1, 2)


@pytest.mark.parametrize(
    ("flow", "words"),
    [
        (Flow(0, 10, 1.0), "prompt and rate must be above 0"),
        (Flow(10, -1, 1.0), "output 0 or more"),
        (Flow(10, 10, float("nan")), "prompt and rate"),
    ],
)
def test_bad_types(flow: Flow, words: str) -> None:
    with pytest.raises(PenstockError, match=words):
        solve([flow], COST)


FLOWS = st.lists(
    st.builds(Flow, st.integers(1, 500), st.integers(0, 300), st.floats(0.01, 500.0)), min_size=1, max_size=4
)
COSTS = st.builds(
    StepCost, st.floats(1e-4, 0.1), st.floats(1e-9, 1e-5), st.sampled_from([-1.0, 1e-7, 1e-5]), st.floats(0, 1e-5)
)


@given(FLOWS, COSTS)
def test_the_equilibrium_balances(flows: list[Flow], cost: StepCost) -> None:
    """A step with n* a stage takes exactly as long as n* take to come, and holds M*."""
    if sum(flow.rate_rps * cost.request_s(flow) for flow in flows) > 0.99:
        with pytest.raises(PenstockError):
            whole_thresholds(flows, cost, margin=0.03)
        return
    found = solve(flows, cost)
    assert isclose(batch_seconds(flows, cost, found.starts), found.step_s, rel_tol=1e-9)
    assert isclose(memory_of(flows, found.starts), found.memory_tokens, rel_tol=1e-9)


@given(FLOWS, COSTS, st.floats(0.0, 0.2))
def test_whole_thresholds_keep_up_and_none_smaller_does(flows: list[Flow], cost: StepCost, margin: float) -> None:
    if sum(flow.rate_rps * cost.request_s(flow) for flow in flows) * (1 + margin) > 0.95:
        return
    found = whole_thresholds(flows, cost, margin)
    verdict = judge(flows, cost, found)
    assert (1 + margin) * verdict.batch_s <= verdict.gather_s * (1 + 1e-6)
    assert verdict.over >= 1.0 - 1e-9
    for k in range(len(flows)):
        if found[k] > 1:
            fewer = judge(flows, cost, tuple(n - (i == k) for i, n in enumerate(found)))
            assert (1 + margin) * fewer.batch_s > fewer.gather_s * (1 - 1e-6)
