"""The leaping engine against its oracle, on random small worlds with preemptions, migrations, flips and faults."""

from __future__ import annotations

import os

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

from penstock.sim.result import SimResult, TokenGaps
from tests.sim.support import SLO, Case, cases

EXAMPLES = int(os.environ.get("PENSTOCK_EXAMPLES", "300"))
# A case comes from one seed, so shrinking it finds nothing simpler; what fails is printed whole.
COMMON = settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


def assert_equal(leap: SimResult, step: SimResult) -> None:
    a, b = leap.requests, step.requests
    assert (a.outcome == b.outcome).all()
    assert (a.preemptions == b.preemptions).all()
    assert (a.migrations == b.migrations).all()
    assert (a.emitted == b.emitted).all()
    assert (a.decode_instance == b.decode_instance).all()
    for name in ("prefill_start_s", "first_token_s", "decode_start_s", "finish_s"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-9, err_msg=name)
    assert a.lateness_s is not None and b.lateness_s is not None
    np.testing.assert_allclose(a.lateness_s, b.lateness_s, rtol=0, atol=1e-9)
    assert (leap.gaps.batch * leap.gaps.count).sum() == (step.gaps.batch * step.gaps.count).sum()
    np.testing.assert_allclose(total_of(leap.gaps), total_of(step.gaps), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(leap.instances.busy_s, step.instances.busy_s, rtol=1e-9, atol=1e-9)
    assert (leap.instances.peak_blocks == step.instances.peak_blocks).all()
    assert leap.failed_migrations == step.failed_migrations


def total_of(gaps: TokenGaps) -> float:
    """The sum of all gaps between tokens."""
    rises = gaps.rise_s * gaps.count * (gaps.count - 1) / 2
    return float((gaps.batch * (gaps.count * gaps.first_s + rises)).sum())


def assert_complete(case: Case, result: SimResult) -> None:
    """Every request ends in exactly one state, and a finished one has all its tokens."""
    r = result.requests
    finished = r.outcome == 1
    assert (finished | (r.outcome == 2)).all()
    assert (r.emitted[finished] == case.trace.output_tokens[finished]).all()
    assert (r.first_token_s[finished] <= r.finish_s[finished]).all()
    assert (r.first_token_s[finished] > case.trace.arrival_s[finished]).all()
    # The last token is one of those whose lateness counts, and none came after it.
    several = finished & (case.trace.output_tokens > 1)
    due = case.trace.arrival_s + SLO.ttft_s + SLO.tpot_s * (case.trace.output_tokens - 1)
    assert r.lateness_s is not None
    assert (r.lateness_s[several] >= (r.finish_s - due)[several] - 1e-9).all()
    latest = r.finish_s - case.trace.arrival_s - SLO.ttft_s - SLO.tpot_s
    assert (r.lateness_s[several] <= latest[several] + 1e-9).all()
    assert (r.lateness_s[finished & ~several] == -np.inf).all()


def leap_and_step(case: Case) -> tuple[SimResult, SimResult]:
    """Run a case both ways; hold the results equal and complete."""
    _, leap = case.run(stepping=False)
    _, step = case.run(stepping=True)
    assert_equal(leap, step)
    assert_complete(case, leap)
    return leap, step


@given(cases())
@settings(COMMON)
def test_leaping_equals_stepping(case: Case) -> None:
    leap_and_step(case)


@given(cases(faults=True))
@settings(COMMON)
def test_leaping_equals_stepping_with_dying_instances(case: Case) -> None:
    leap_and_step(case)


@given(cases(hashes=True))
@settings(COMMON)
def test_leaping_equals_stepping_with_a_prefix_cache(case: Case) -> None:
    leap_and_step(case)


@given(cases(faults=True))
@settings(COMMON)
def test_leaping_equals_stepping_with_an_order_and_a_budget(case: Case) -> None:
    case = case.equipped("order budget" if case.scenario.seed % 5 else "order")
    leap_and_step(case)


@given(cases(faults=True))
@settings(COMMON)
def test_leaping_equals_stepping_with_clock_levels(case: Case) -> None:
    case = case.clocked().equipped("clock order" if case.scenario.seed % 3 == 0 else "clock")
    leap, step = leap_and_step(case)
    one, other = leap.instances.energy, step.instances.energy
    assert one is not None and other is not None
    np.testing.assert_allclose(one.clock_busy_s, other.clock_busy_s, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one.clock_busy_s.sum(axis=1), leap.instances.busy_s, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one.energy_j, other.energy_j, rtol=1e-9)
    np.testing.assert_allclose(one.clock_j.sum(axis=1) + one.idle_j, one.energy_j, rtol=1e-9)


@given(cases(faults=True, hashes=True))
@settings(COMMON)
def test_leaping_equals_stepping_with_everything(case: Case) -> None:
    leap_and_step(case)
